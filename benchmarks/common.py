"""What every benchmark prints first and how it leaves its results: results/NAME.txt and results/NAME.csv."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

import revify
from revify.measuring.report import describe

RESULTS = Path(__file__).parent / "results"


@dataclass
class Results:
    """Prints as it goes, and keeps what it printed.

    Args:
        name: of the files under results/.
        columns: name → width of the table's columns, in order.
    """

    name: str
    columns: dict[str, int]
    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def __post_init__(self) -> None:
        command = " ".join(["python", *sys.argv])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.say(f"$ {command}")
        self.say(f"{datetime.date.today()}, {describe(device)}, {torch.get_num_threads()} threads")
        self.say(
            f"revify {revify.__version__} ({commit()}), torch {torch.__version__}, timm {timm.__version__}, "
            f"Python {platform.python_version()}\n"
        )
        self.say(self._aligned(list(self.columns)))

    def say(self, text: str) -> None:
        """Print lines and keep them."""
        text = "\n".join(line.rstrip() for line in text.split("\n"))
        print(text, flush=True)
        self.lines.append(text)

    def row(self, *values: Any) -> None:
        """Print one row, each value under its column, and keep it."""
        self.rows.append(dict(zip(self.columns, values, strict=True)))
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        self.say(self._aligned(cells))

    def _aligned(self, cells: list[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, self.columns.values(), strict=True)).rstrip()

    def target(self, what: str, value: float, limit: float) -> None:
        """Say whether `value` is no more than `limit`."""
        reached = value <= limit
        self.failed += not reached
        self.say(f"{'reached' if reached else 'MISSED '}  {what}: {value:.4f} (at most {limit:.4f})")

    @staticmethod
    def read(name: str) -> list[dict[str, Any]]:
        """The rows of results/NAME.csv, with numbers as numbers."""
        with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
            return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def write(self) -> int:
        """Leave the files; the exit status: 1 where something was missed."""
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.name}.txt").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        with open(RESULTS / f"{self.name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        return int(self.failed > 0)


def commit() -> str:
    """The commit that is measured, and whether the package differs from it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "revify", "benchmarks/*.py"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout"
    return f"commit {name.strip()}{', changed since' if changed.returncode else ''}"


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:  # not a number of this kind
            continue
    return text
