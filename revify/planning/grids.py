"""grid="auto": for each stage the grid on which its values fit and the changes of its blocks show.

    coarse side   HEADROOM · the largest value < 2^(24−q), the range of float32 on the grid
    fine side     2^-q ≤ what a block changes / STEPS, or what the plain model's own type rounds away

The default, q = 12 (±4096), holds both for most networks. Where values are larger, q is lower. Where the blocks change the
stream by very little (LayerScale that starts at 1e-6), no q does: 24 bits are too few for both, and the plain model's
floating point has them. There the stream is held in float64, with q = 32 (±2^21): it shows what float32 shows, and holds what
training may make of it. A grid that changes while a model is trained, or from batch to batch, is no choice: a sample's
result would depend on others, and a resumed run on more than its weights.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import torch
from torch import nn

from revify.plans import Plan
from revify.reading.flows import Flow, Place, holds_data, watch_flows
from revify.reading.tracing import Example
from revify.runtime.grid import Grid, stream_dtype
from revify.stage_plans import StagePlan
from revify.words import DEFAULT_GRID, WIDE_GRID

HEADROOM = 8  # times the largest value seen: training makes values grow
POINTS = 256  # of the grid, that the largest value in every block is away from zero at least
STEPS = 4  # of the grid, that the change of the median block is at least; rounding is then 7 % of it


def choose_grids(plan: Plan, model: nn.Module, example: Example) -> Plan:
    """The plan with a grid for each stage, from one run of the model on its example, and one in eval mode if it is in that.

    Args:
        plan: of the model.
        model: the plain model; it stays as it is. Without data (on the meta device) the default is kept, and the plan says so.
        example: its inputs.
    """
    if not holds_data(model):
        return replace(plan, unmeasured="the model holds no data")
    blocks = [block for stage in plan.stages for block in stage.blocks]
    places = {block.path: Place(block.stream, block.result) for block in blocks if block.run is None}
    runs = {block.path: block.inputs for block in blocks if block.run is not None}
    try:
        passes = [watch_flows(model, example, places, runs, training=mode) for mode in sorted({True, model.training})]
    except Exception as error:  # analysed without data, a model may not run with them here: half precision on a CPU
        return replace(plan, unmeasured=f"it does not run here: {(str(error).strip().splitlines() or [''])[0]}")

    def fitting(stage: StagePlan) -> int:
        found = [[flows[step] for step in _watched(stage) if step in flows] for flows in passes]
        grids = [fitting_grid(flows, stage.dtype) for flows in found]
        return WIDE_GRID if WIDE_GRID in grids else min(grids)

    return replace(plan, stages=tuple(with_grid(stage, fitting(stage)) for stage in plan.stages))


def _watched(stage: StagePlan) -> list[tuple[str, int | None, int]]:
    """What is known of its flows: of whole blocks, or of the steps of a run."""
    return [
        (block.path, block.run, number)
        for block in stage.blocks
        for number in range(1 if block.run is None else len(block.branch_bytes))
    ]


def with_grid(stage: StagePlan, resolution: int) -> StagePlan:
    """The stage on this grid, with what a value of its stream takes there."""
    held = Grid(resolution).held_in(getattr(torch, stage.dtype))
    elements = stage.stream_bytes // stage.element_bytes
    return replace(stage, grid=resolution, stream_bytes=elements * held.itemsize)


def fitting_grid(flows: list[Flow], dtype: str) -> int:
    """The resolution for blocks through which these values flow."""
    plain: torch.dtype = getattr(torch, dtype)
    rounding = torch.finfo(plain).eps
    changing = [flow for flow in flows if flow.change > 0]  # a block that starts as zero adds nothing on any grid
    needed = [max(flow.change / STEPS, rounding * flow.size) for flow in changing]
    step = statistics.median(needed) if needed else float("inf")
    peak = max((flow.peak for flow in flows), default=0.0)
    if not math.isfinite(peak):
        return DEFAULT_GRID
    resolution = DEFAULT_GRID
    while resolution > 0 and HEADROOM * peak > Grid(resolution).limit(stream_dtype(plain)):
        resolution -= 1
    fine = 2.0**-resolution <= step and all(flow.peak * 2**resolution >= POINTS for flow in flows if flow.peak)
    return resolution if fine else WIDE_GRID
