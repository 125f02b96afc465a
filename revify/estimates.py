"""What a training step is predicted to need and to take, for one plan and along the frontier of all; prints as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from revify.printing import draw_table
from revify.records import Prose, Range, printable

PLAIN, CHECKPOINTED, THIS_PLAN = "plain", "checkpointed", "this plan"
WITHIN = "within a budget"


@dataclass(frozen=True, slots=True)
class Point:
    """A training step, predicted.

    Args:
        name: "plain", "checkpointed" (each block runs again), "this plan", or "within a budget": the fastest plan in it.
        peak: the most bytes that it allocates at a time.
        time: of the step, as a multiple of the plain one's.
    """

    name: Prose
    peak: Annotated[int, Range(0, 2**60)]
    time: Annotated[float, Range(0, float("inf"))]


@dataclass(frozen=True, slots=True)
class Frontier:
    """Time against memory, predicted; prints as a table.

    Args:
        model: its class name.
        points: of plain, checkpointed and converted steps, by their peaks.
    """

    model: str
    points: tuple[Point, ...]

    def __str__(self) -> str:
        rival = next((point for point in self.points if point.name == CHECKPOINTED), None)
        rows = [
            (
                printable(point.name),
                f"{point.peak / 2**20:.1f}",
                f"{point.peak / rival.peak:.2f}" if rival and rival.peak else "–",
                f"{point.time:.2f}",
            )
            for point in sorted(self.points, key=lambda point: (point.peak, point.time))
        ]
        return draw_table(
            ("one training step", ">peak MiB", ">of checkpointed", ">time of plain"),
            rows,
            title=printable(f"{self.model}: time against memory, predicted"),
        )
