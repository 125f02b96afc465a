"""Plan → text: a table with a row for each stage, and what is left as it is.

A plan may come out of a file, so its names are drawn as they are: no markup, and nothing that a terminal obeys.
"""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from revify.records import printable

if TYPE_CHECKING:
    from revify.plans import Plan, Refusal

SIGNS = {"positive": "", "balanced": " +−−+", "random": " ±"}  # of γ, behind the predictor


def draw_plan(plan: Plan) -> str:
    """The plan as text, with a row for each stage."""
    shapes = ", ".join("×".join(map(str, shape)) for shape in plan.example)
    name = f"{plan.architecture} ({plan.model})" if plan.architecture else plan.model
    table = Table(box=box.SIMPLE_HEAD, title=printable(f"{name}, input {shapes}"), title_justify="left")
    for column in ("stage", "blocks", "shape", "shortcut", "coupling" if plan.is_split else "predictor"):
        table.add_column(column)
    for column in ("bits", "deviation", "saved MiB", "share"):
        table.add_column(column, justify="right")
    for number, stage in enumerate(plan.stages):
        first, last = stage.blocks[0], stage.blocks[-1]
        cut = f", {len(stage.steps)} branches" if len(stage.steps) > len(stage.blocks) else ""
        if stage.coupling:
            ways = Counter(half.how for block in stage.blocks for half in block.halves)
            cut = f", branches: {', '.join(f'{count} {way}' for way, count in ways.items())}"
        forecast = f"{stage.predictor}{f' {stage.rank}' if stage.rank else ''}{SIGNS[stage.sign]}"
        table.add_row(
            str(number),
            printable(f"{first.path} … {last.path} ({len(stage.blocks)} {first.kind}{cut})"),
            "×".join(map(str, stage.shape[1:])),
            ", ".join(sorted({b.shortcut for b in stage.blocks})),
            stage.coupling or forecast,
            stage.bits_text,
            "–" if stage.deviation is None else f"{stage.deviation:.4f}",
            f"{stage.saved_bytes / 2**20:.1f}",
            f"{stage.saved_bytes / max(plan.saved_bytes, 1):.0%}",
        )
    text = io.StringIO()
    console = Console(file=text, width=140, highlight=False, markup=False, emoji=False)
    console.print(table)
    for c in plan.checkpointed:
        console.print(f"  checkpointed: {printable(', '.join(c.paths))} ({c.saved_bytes / 2**20:.1f} MiB)")
    for reason, paths in group_reasons(plan.refusals).items():
        console.print(f"  left as it is: {printable(paths)}: {printable(reason, 2000)}")
    console.print(
        f"  saved for backward: plain {plan.saved_bytes / 2**20:.1f} MiB ({plan.stage_share:.0%} in stages), "
        f"predicted peak converted {plan.predicted_bytes / 2**20:.1f} MiB"
    )
    if any(b.shortcut == "post-activation" for stage in plan.stages if stage.coupling for b in stage.blocks):
        console.print("  the activations after the additions go into the branches, and once to the end of each stage")
    for grid in sorted({plan.grid_of(stage) for stage in plan.stages}, key=lambda grid: grid.resolution):
        numbers = ", ".join(str(n) for n, stage in enumerate(plan.stages) if plan.grid_of(stage) == grid)
        held = ", held in float64: its blocks change it by less than float32 shows on a grid" if grid.is_wide else ""
        console.print(f"  grid of stage {numbers}: 2^-{grid.resolution}{held}")
    if plan.unmeasured:
        console.print(f"  this grid is the default, nothing was measured: {plan.unmeasured}")
    if plan.traced != "whole":
        console.print(f"  traced {printable(plan.traced, 2000)}")
    return text.getvalue().rstrip()


def group_reasons(refusals: tuple[Refusal, ...]) -> dict[str, str]:
    """Each reason with the modules that it was given for."""
    groups: dict[str, list[str]] = {}
    for refusal in refusals:
        groups.setdefault(refusal.reason, []).append(refusal.path or "the whole model")
    return {
        reason: ", ".join(paths) if len(paths) < 4 else f"{paths[0]}, {paths[1]} and {len(paths) - 2} more"
        for reason, paths in groups.items()
    }
