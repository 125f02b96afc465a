"""Fine-tuning that is killed (SIGKILL) at random moments, again and again, until it is done: is the result the same to the bit?

The recipe draws random numbers everywhere (dropout, drop-path, mixup, erasing, jitter, fitted predictors, bits that change). A
run is killed after a random time, resumed, killed again with some chance, and at last left to finish. Its weights, the best
ones, the plain ones and the history are compared with those of a run that nothing ended. What a killed process leaves
(temporary files, half-written states) must be gone in the end.

Exit status 1 if anything differs. Each attempt is a process of its own, forked from this one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results
from PIL import Image
from safetensors.torch import load_file

from revify.finetuning import Recipe, finetune

NOISE: dict[str, Any] = {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "patch_size": 8, "depth": 4}


def images(folder: Path) -> Path:
    """Two classes of noise, 12 images to train on and 4 to validate on."""
    numbers = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in "ab":
            (folder / part / name).mkdir(parents=True)
            for place in range(count):
                pixels = numbers.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{place}.png")
    return folder


def recipe(data: Path, out: Path, resume: bool = False) -> Recipe:
    return Recipe(
        model="test_vit",
        model_kwargs=NOISE,
        img_size=16,
        data=data,
        out=out,
        epochs=4,
        batch_size=4,
        mixup=0.2,
        reprob=0.3,
        color_jitter=0.2,
        workers=0,
        calibrate=8,
        predictor="diagonal",
        bits=1,
        bits_schedule=((2, 3),),
        resume=resume,
    )


def attempt(data: Path, out: Path, after: float | None) -> bool:
    """Start or resume the run in a process of its own, and kill it after some seconds; whether it finished."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            finetune(recipe(data, out, resume=(out / "recipe.json").exists()))
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + (after if after is not None else 3600)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"the run in {out} failed with status {status}")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def outcome(out: Path) -> dict[str, Any]:
    """Everything that a run leaves but its times."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= {f"{path.name} {name}": value for name, value in load_file(path).items()}
    epochs = json.loads((out / "result.json").read_text())["epochs"]
    found |= {
        f"epoch {e['epoch']} {k}": v for e in epochs for k, v in e.items() if k not in ("step_seconds", "peak_bytes")
    }
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def left_behind(out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".tmp", ".partial")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results("kills", {"run": 4, "kills": 6, "same": 6, "left behind": 12})
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = images(Path(folder) / "data")
        attempt(data, Path(folder) / "first", None)  # the second one is quicker, and says how long a run takes
        start = time.monotonic()
        attempt(data, Path(folder) / "whole", None)
        length, expected = time.monotonic() - start, outcome(Path(folder) / "whole")
        kills = different = leftovers = early = number = 0
        while kills < options.kills:
            out, own, number = Path(folder) / f"run{number}", 0, number + 1
            while not attempt(data, out, chance.uniform(0, length) if chance.random() < 0.75 else None):
                own += 1
                early += not (out / "last.safetensors").exists()
            equal, left = same(outcome(out), expected), left_behind(out)
            kills, different, leftovers = kills + own, different + (not equal), leftovers + len(left)
            results.row(number, own, "yes" if equal else "NO", len(left))
    results.say(f"{kills} kills in {number} runs; {early} of them before the first epoch was whole")
    results.target("runs with another result", different, 0)
    results.target("files left behind", leftovers, 0)
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
