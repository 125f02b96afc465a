"""Runs the training programs of this folder, or some of them, and writes benchmarks/programs.md.

    python benchmarks/programs/page.py [timm_script …]

Rows of programs that are not run now stay as they are on the page. The exit status is 1 if a row differs.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "programs.md"
sys.path.insert(0, str(HERE.parent))
from common import commit  # noqa: E402  # the folder above is no package

PROGRAMS = {
    "timm_script": "timm's training script",
    "torchvision_script": "torchvision's reference script",
    "transformers_trainer": "transformers' Trainer",
    "lightning_trainer": "Lightning's Trainer",
    "accelerate_loop": "Accelerate",
    "distributed": "two processes",
}
PACKAGES = ("torch", "torchvision", "timm", "transformers", "lightning", "accelerate", "numpy")
HEAD = """# Training programs

Each program of `benchmarks/programs/` trains a small converted network twice from the same seed: with revify's backward, and
under ordinary autograd (`with revify.plain_backward():`). Afterwards all weights, running statistics, averages of
weights, losses and outputs are compared, to the bit. Printed by `python benchmarks/programs/page.py`.

{environment}

| program | setting | tensors compared | of them trained | different |
|---|---|---|---|---|
"""


def main(names: list[str]) -> int:
    """Run the programs of these names, all of them where none is named."""
    chosen = names or list(PROGRAMS)
    rows = [line for line in _rows() if not any(line.startswith(f"| {PROGRAMS[name]} |") for name in chosen)]
    failed = False
    for name in chosen:
        found = _run(name)
        failed |= not found or any(row["different"] for row in found)
        rows += [
            f"| {r['program']} | {r['setting']} | {r['compared']} | {r['trained']} | {r['different']} |" for r in found
        ]
    order = [f"| {title} |" for title in PROGRAMS.values()]
    rows.sort(key=lambda line: next(place for place, start in enumerate(order) if line.startswith(start)))
    PAGE.write_text(HEAD.format(environment=_environment()) + "\n".join(rows) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    return int(failed)


def _run(name: str) -> list[dict[str, object]]:
    """The rows of one program, which runs in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(HERE.parents[1]), os.environ.get("PYTHONPATH", ""))),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py")], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"program"')]


def _rows() -> list[str]:
    """Those that stand on the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    return [line for line in lines if any(line.startswith(f"| {title} |") for title in PROGRAMS.values())]


def _environment() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    python = f"Python {platform.python_version()}, {platform.machine()}, CPU, one thread each"
    return f"revify {commit()}; {python}; {', '.join(found)}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
