"""Damaged plans and files by the hundred thousand: one kind of error, no memory, no waiting, no code.

Each input is a plan or a file of a small model, damaged at one to three places: values of other types, out of their ranges,
from other fields, names of functions, missing and unknown fields, flipped bytes, lengths that lie. A plan that is read all
the same is drawn, written and read again; one in ten is put to the model, and the converted model is run once in a hundred.
A file is loaded with the model given and without it.

Exit status 1 if anything raises another exception than RevifyError, takes 5 seconds, allocates more than twice the file and
the model (beside 32 MiB that Python, torch and timm take for themselves), or imports, starts or connects to anything. Linux
only: memory is the peak that the kernel counts.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from common import Results
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import revify
from revify import couplings

SECONDS, SPARE = 5.0, 32 * 2**20
EVENTS = (
    "import",
    "exec",
    "os.system",
    "os.exec",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 9, 63, 99, 2000, 10**6, 2_000_000, 2**31, 2**53, 2**64, 10**30, -(10**30)),
    *(0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), [], {}, [[]], [None], {"": None}),
    *("", "x", "[/]", "[bold]", "\x1b[2J", "\ud800", "\x00", "a\nb", "x" * 5000, "../../etc/passwd", "–", "γ"),
    *("os:abort", "builtins:exec", "os:_exit", "subprocess:Popen", "additive", "affine", "derive", "__class__"),
    *(
        "linear",
        "lowrank",
        "diagonal",
        "linear_z",
        "midpoint",
        "random",
        "balanced",
        "lifted",
        "lifted whole",
        "branch",
    ),
    *("blocks.0", "blocks", "head", "blocks.0.mlp.fc1", "blocks.0.mlp.fc1.weight", "blocks.1.norm1"),
)


@dataclass
class Found:
    """What went wrong, and how much was tried."""

    inputs: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    samples: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0
    largest: int = 0
    events: list[str] = field(default_factory=list)
    watching: bool = False

    def notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook: what Python is about to do."""
        if not self.watching or event not in EVENTS:
            return
        if event == "import" and (arguments[0] in sys.modules or not arguments[1]):
            return  # without a file: part of a package that is there
        if event == "exec" and getattr(arguments[0], "co_filename", "").startswith("<eval_with_key>"):
            return  # torch.fx's code of the given model
        self.events.append(f"{event} {arguments[0]!r:.80}")


@contextmanager
def watched(found: Found, kind: str, size: int, damage: str) -> Iterator[None]:
    """Try one input: count it, and judge what happens."""
    found.inputs[kind] += 1
    account = kind == "files" or found.inputs[kind] % 20 == 0  # it costs more than reading a plan does
    before = memory() if account else 0
    start = time.perf_counter()
    found.watching = True
    try:
        yield
    except revify.RevifyError as error:
        found.refused[kind] += 1
        if "\n" in str(error) or len(str(error)) > 3000:
            fault(found, kind, f"{type(error).__name__} of {len(str(error))} characters or several lines", damage)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        fault(
            found, kind, f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}", f"{damage}: {error}"
        )
    finally:
        found.watching = False
    seconds = time.perf_counter() - start
    taken = memory(peak=True) - before if account else 0
    found.slowest, found.largest = max(found.slowest, seconds), max(found.largest, taken)
    if seconds > SECONDS:
        fault(found, kind, "took more than 5 seconds", f"{damage}: {seconds:.1f} s")
    if taken > 2 * size + SPARE:
        fault(found, kind, "took more memory than twice the file and the model", f"{damage}: {taken / 2**20:.0f} MiB")
    for event in found.events:
        fault(found, kind, f"event {event}", damage)
    found.events.clear()


def fault(found: Found, kind: str, what: str, sample: str) -> None:
    found.faults[f"{kind}: {what}"] += 1
    found.samples.setdefault(f"{kind}: {what}", sample[:300])


def memory(peak: bool = False) -> int:
    """Bytes that this process holds, or the most since that was asked."""
    status = Path("/proc/self/status").read_text().splitlines()
    found = {line.partition(":")[0]: line.split()[1] for line in status if line.startswith("Vm")}
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is there now
    return int(found["VmHWM" if peak else "VmRSS"]) * 1024


SIZES = ("embed_dim", "depth", "num_heads", "img_size", "patch_size", "mlp_ratio", "num_classes", "in_chans")


# Damage


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON tree."""
    yield way
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in children:
        yield from places(item, (*way, key))


def damaged(tree: Any, chance: random.Random) -> tuple[Any, str]:
    """A copy of a JSON tree with one to three faults, and what they are."""
    tree = json.loads(json.dumps(tree))
    said = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        ways = [way for way in places(tree) if way]
        if not ways:
            return chance.choice(NASTY), "all of it"
        way = chance.choice(ways)
        owner = tree
        for key in way[:-1]:
            owner = owner[key]
        value, action = owner[way[-1]], chance.randrange(8)
        if action == 0:
            del owner[way[-1]]
            said.append(f"without {way}")
            continue
        if action == 1 and isinstance(owner, dict):
            owner[f"{way[-1]}x"] = value
        new = other(tree, value, chance, action)
        owner[way[-1]] = new
        said.append(f"{way} = {new!r:.60}")
    return tree, "; ".join(said)


def other(tree: Any, value: Any, chance: random.Random, action: int) -> Any:
    """Another value for one of a tree."""
    if action == 2:  # that of another place
        for key in chance.choice(list(places(tree))):
            tree = tree[key]
        return json.loads(json.dumps(tree))
    if action == 3 and isinstance(value, int):
        return (
            value + chance.choice((-1, 1, 2, 10, 1000)) if chance.random() < 0.7 else value * chance.choice((-1, 10**6))
        )
    if action == 4 and isinstance(value, list):
        return value * chance.choice((0, 2, 50))
    if action == 5:
        for _ in range(chance.choice((3, 100, 200))):
            value = [value]
        return value
    return chance.choice(NASTY)


def flipped(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A file with other bytes, another length or another length of its header."""
    action, spoilt = chance.randrange(5), bytearray(data)
    header = struct.unpack("<Q", data[:8])[0]
    if action == 0:
        return data[: chance.randrange(len(data))], "cut off"
    if action == 1:
        spoilt[:8] = struct.pack("<Q", chance.choice((0, 1, header - 1, header + 1, 2**31, 2**63, len(data))))
        return bytes(spoilt), "another length of the header"
    if action == 2:
        return data + bytes(chance.randrange(1, 100)), "longer"
    for _ in range(chance.choice((1, 1, 3, 30))):
        spoilt[chance.randrange(8, 8 + header)] = chance.randrange(256)
    return bytes(spoilt), "bytes of the header"


# What is damaged


def vit() -> nn.Module:
    return timm.create_model("test_vit", img_size=32, num_classes=4)


def leapfrog(x1: torch.Tensor, x2: torch.Tensor, F: couplings.Branch) -> couplings.Streams:
    """A coupling that no file may name without being given it."""
    return x2, x1 + F(x2)


def subjects() -> list[tuple[str, nn.Module]]:
    """Converted small models, one for every kind of plan."""
    images = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)
    torch.manual_seed(0)
    return [
        ("fixed", revify.convert(vit(), bits=2)),
        ("branches", revify.convert(vit(), unit="branch", bits=0)),
        ("random", revify.convert(vit(), predictor="midpoint", bits=1, sign="random", transitions="keep")),
        ("fitted", revify.convert(vit(), calibration=images, predictor="linear", bits=1)),
        ("low rank", revify.calibrate(revify.convert(vit()), images, predictor="lowrank", rank=2)),
        ("split", revify.convert(vit(), streams="split")),
        ("own", revify.convert(vit(), streams="split", coupling=leapfrog)),
    ]


def try_plan(text: str, apply: bool, run: bool) -> None:
    plan = revify.Plan.from_json(text)
    str(plan)
    assert revify.Plan.from_json(plan.to_json()) == plan
    if not apply:
        return
    converted = revify.convert(vit(), plan=plan)
    if run:
        converted(torch.zeros(2, 3, 32, 32)).sum().backward()


def fuzz_plans(found: Found, models: list[tuple[str, nn.Module]], count: int, chance: random.Random) -> None:
    trees = [json.loads(model.revify_plan.to_json()) for _, model in models]
    size = sum(p.numel() * p.element_size() for p in vit().parameters())
    for number in range(count):
        tree, damage = damaged(chance.choice(trees), chance)
        text = json.dumps(tree)
        if chance.random() < 0.05:
            start = chance.randrange(len(text))
            text = text[:start] + chance.choice(("", "[", '"', "\x00", "9" * 400, "[" * 4000)) + text[start + 1 :]
        with watched(found, "plans", len(text) + size, damage):
            try_plan(text, apply=number % 10 == 0, run=number % 100 == 0)


def fuzz_files(
    found: Found, models: list[tuple[str, nn.Module]], count: int, chance: random.Random, folder: Path
) -> None:
    size = sum(p.numel() * p.element_size() for p in vit().parameters())
    path, record = folder / "fuzzed.safetensors", {"name": "test_vit", "kwargs": {"img_size": 32, "num_classes": 4}}
    originals = []
    for number, (_, model) in enumerate(models):
        revify.save(model, folder / f"{number}.safetensors", record)
        with safe_open(folder / f"{number}.safetensors", framework="pt") as handle:
            metadata = handle.metadata()
        originals.append(
            (load_file(folder / f"{number}.safetensors"), metadata, (folder / f"{number}.safetensors").read_bytes())
        )
    for _ in range(count):
        tensors, metadata, data = chance.choice(originals)
        action = chance.randrange(6)
        if action < 2:
            data, damage = flipped(data, chance)
            path.write_bytes(data)
        else:
            metadata, damage = changed(metadata, chance, action)
            if chance.random() < 0.1:
                tensors = dict(tensors)
                name = chance.choice(list(tensors))
                tensors[name] = chance.choice((tensors[name][:1].clone(), tensors[name].long(), tensors[name].bool()))
                damage += f"; another {name}"
            save_file(tensors, path, metadata)
        given = vit() if chance.random() < 0.5 else None
        with watched(found, "files", path.stat().st_size + size, damage):
            revify.load(path, given)


def changed(metadata: dict[str, str], chance: random.Random, action: int) -> tuple[dict[str, str], str]:
    """Metadata with damage in one of its entries."""
    key = {2: "plan", 3: "architecture", 4: "architecture"}.get(action) or chance.choice(list(metadata))
    metadata = dict(metadata)
    if action == 3:  # sizes
        record = json.loads(metadata[key])
        name = chance.choice(
            ("embed_dim", "depth", "num_heads", "img_size", "patch_size", "mlp_ratio", "num_classes", "in_chans")
        )
        record["kwargs"][name] = chance.choice((*NASTY, 4096, 4095, 1024, 333, [4096, 4096], 10**5))
        metadata[key] = json.dumps(record)
        return metadata, f"{name} = {record['kwargs'][name]!r:.60}"
    try:
        tree, damage = damaged(json.loads(metadata[key]), chance)
        metadata[key] = json.dumps(tree)
    except (ValueError, TypeError):
        metadata[key], damage = chance.choice(("", "\x00", "[", "x" * 9000)), f"{key} is no JSON"
    return metadata, damage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results("fuzz", {"inputs": 8, "tried": 8, "refused": 8, "faults": 8})
    found, chance = Found(), random.Random(options.seed)
    models = subjects()
    with tempfile.TemporaryDirectory() as folder:
        work: tuple[Callable[[Found, int], None], ...] = (
            lambda into, count: fuzz_plans(into, models, count, chance),
            lambda into, count: fuzz_files(into, models, count, chance, Path(folder)),
        )
        for step in work:  # what is imported and kept at first
            step(Found(), 300)
        sys.addaudithook(found.notice)
        work[0](found, options.plans)
        work[1](found, options.files)
    for kind in ("plans", "files"):
        faults = sum(count for what, count in found.faults.items() if what.startswith(kind))
        results.row(kind, found.inputs[kind], found.refused[kind], faults)
    for what, count in found.faults.most_common():
        results.say(f"    {count} × {what}\n        such as {found.samples[what]!a}")
    results.target("faults", sum(found.faults.values()), 0)
    results.target("slowest, seconds", found.slowest, SECONDS)
    results.say(f"largest growth of memory for one input: {found.largest / 2**20:.1f} MiB")
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
