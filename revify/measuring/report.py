"""The costs of one training step in three forms → a table and JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from revify.printing import draw_table


@dataclass(frozen=True, slots=True)
class Row:
    """The cost of one training step of one form of the model; None where the device ran out of memory."""

    how: str
    peak_bytes: int | None
    held_bytes: int | None
    step_seconds: float | None
    time_ratio: float | None  # to checkpointed: median over the rounds in which both ran


@dataclass(frozen=True, slots=True)
class Report:
    """What `measure` found, and on what; prints as a table."""

    model: str
    batch: tuple[tuple[int, ...], ...]
    dtype: str
    device: str
    threads: int
    repeats: int
    torch: str
    timm: str
    revify: str
    plain: Row
    checkpointed: Row
    converted: Row

    def to_json(self) -> str:
        """The same as JSON, one object."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.batch)
        forms = {name: getattr(self, name) for name in ("plain", "checkpointed", "converted")}
        return draw_table(
            ("one training step", ">peak MB", ">ratio", ">held MB", ">step s", ">ratio"),
            [(name, *_cells(row, self.checkpointed)) for name, row in forms.items()],
            title=f"{self.model}, batch {shapes}, {self.dtype}; {self.device}, {self.threads} threads\n"
            f"torch {self.torch}, timm {self.timm}, revify {self.revify}",
            notes=(
                f"checkpointed: {self.checkpointed.how}; converted: {self.converted.how}",
                "MB: 10^6 bytes above what was allocated before the step; held: between forward and backward",
                f"step: median of {self.repeats} alternating runs; ratio: to checkpointed",
            ),
        )


def _cells(row: Row, rival: Row) -> tuple[str, ...]:
    if row.peak_bytes is None or row.held_bytes is None or row.step_seconds is None:
        return ("out of memory",)
    memory = f"{row.peak_bytes / rival.peak_bytes:.3f}" if rival.peak_bytes else "-"
    time = f"{row.time_ratio:.3f}" if row.time_ratio else "-"
    return f"{row.peak_bytes / 1e6:.2f}", memory, f"{row.held_bytes / 1e6:.2f}", f"{row.step_seconds:.4f}", time


def describe(device: torch.device) -> str:
    """The device in words: its kind and its model."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} ({names[0] if names else platform.processor() or platform.machine()})"
