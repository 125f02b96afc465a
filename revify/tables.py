"""Plan → text: a table with a row for each stage, and what is left as it is.

A plan may come out of a file, so its names are drawn as they are: no markup, and nothing that a terminal obeys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from revify.printing import draw_table
from revify.records import printable

if TYPE_CHECKING:
    from revify.plans import Plan, Refusal
    from revify.stage_plans import StagePlan

SIGNS = {"positive": "", "balanced": " {pattern}", "random": " ±"}  # of γ, behind the predictor


def draw_plan(plan: Plan) -> str:
    """The plan as text, with a row for each stage."""
    shapes = ", ".join("×".join(map(str, shape)) for shape in plan.example)
    name = f"{plan.architecture} ({plan.model})" if plan.architecture else plan.model
    how = "coupling" if plan.is_split else "predictor"
    return draw_table(
        ("stage", "blocks", "shape", "shortcut", how, ">bits", ">deviation", ">saved MiB", ">share"),
        [_row(number, stage, plan) for number, stage in enumerate(plan.stages)],
        title=printable(f"{name}, input {shapes}"),
        notes=[f"  {note}" for note in _notes(plan)],
    )


def _row(number: int, stage: StagePlan, plan: Plan) -> tuple[str, ...]:
    first, last = stage.blocks[0], stage.blocks[-1]
    cut = f", {len(stage.steps)} branches" if len(stage.steps) > len(stage.blocks) else ""
    if stage.within is not None:
        cut = f", {stage.length} calls, each codes its input"
    if stage.coupling:
        ways = Counter(half.how for block in stage.blocks for half in block.split_branches)
        cut = f", branches: {', '.join(f'{count} {way}' for way, count in ways.items())}"
    signs = SIGNS[stage.sign].format(pattern=stage.pattern.replace("-", "−"))
    forecast = f"{stage.predictor}{f' {stage.rank}' if stage.rank else ''}{signs}"
    return (
        str(number),
        printable(f"{first.path} … {last.path} ({len(stage.blocks)} {first.kind}{cut})"),
        "×".join(map(str, stage.shape[1:])),
        ", ".join(sorted({b.shortcut for b in stage.blocks})),
        stage.coupling or ("coded" if stage.step == "coded" else forecast),
        stage.bits_text,
        "–" if stage.deviation is None else f"{stage.deviation:.4f}",
        f"{stage.saved_bytes / 2**20:.1f}",
        f"{stage.saved_bytes / max(plan.saved_bytes, 1):.0%}",
    )


def _notes(plan: Plan) -> Iterator[str]:
    """What is said of the plan as a whole, below its table."""
    if not plan.stages:
        yield "no stage: nothing here is undone step by step; what is checkpointed runs again from an input that is held"
    for number, stage in enumerate(plan.stages):
        for mode, words in (("keep", "kept by ordinary autograd"), ("recompute", "running again from an input")):
            if those := [block.path for block in stage.blocks if block.mode == mode]:
                yield f"stage {number}, {words}: {printable(', '.join(those))}"
    for c in plan.checkpointed:
        yield f"checkpointed: {printable(', '.join(c.paths))} ({c.saved_bytes / 2**20:.1f} MiB)"
    for reason, paths in group_reasons(plan.refusals).items():
        yield f"left as it is: {printable(paths)}: {printable(reason, 2000)}"
    yield (
        f"saved for backward: plain {plan.saved_bytes / 2**20:.1f} MiB ({plan.stage_share:.0%} in stages), "
        f"predicted peak converted {plan.predicted_peak / 2**20:.1f} MiB"
    )
    if plan.points:
        told = (f"{p.name} {p.peak / 2**20:.1f} MiB, {p.time:.2f} of plain's time" for p in plan.points[:3])
        yield f"one training step, predicted: {printable('; '.join(told))}"
    if any(b.shortcut == "post-activation" for stage in plan.stages if stage.coupling for b in stage.blocks):
        yield "the activations after the additions go into the branches, and once to the end of each stage"
    on_grid = [stage for stage in plan.stages if stage.step == "recurrence"]
    for grid in sorted({plan.grid_of(stage) for stage in on_grid}, key=lambda grid: grid.resolution):
        numbers = ", ".join(str(n) for n, s in enumerate(plan.stages) if s in on_grid and plan.grid_of(s) == grid)
        held = ", held in float64: its blocks change it by less than float32 shows on a grid" if grid.is_wide else ""
        yield f"grid of stage {numbers}: 2^-{grid.resolution}{held}"
    for number, stage in enumerate(plan.stages):
        if kept := sum(block.kept_bytes for block in stage.blocks):
            first = next(block.path for block in stage.blocks if block.kept_bytes)
            yield (
                f"stage {number} keeps {kept / 2**20:.1f} MiB more, which grows with its depth: {printable(first)} and others "
                "hold values as attributes, or in custom Functions that do not save them with save_for_backward"
            )
    if plan.unmeasured:
        yield f"this grid is the default, nothing was measured: {plan.unmeasured}"
    if plan.traced != "whole":
        yield f"traced {printable(plan.traced, 2000)}"


def group_reasons(refusals: tuple[Refusal, ...]) -> dict[str, str]:
    """Each reason with the modules that it was given for."""
    groups: dict[str, list[str]] = {}
    for refusal in refusals:
        groups.setdefault(refusal.reason, []).append(refusal.path or "the whole model")
    return {
        reason: ", ".join(paths) if len(paths) < 4 else f"{paths[0]}, {paths[1]} and {len(paths) - 2} more"
        for reason, paths in groups.items()
    }
