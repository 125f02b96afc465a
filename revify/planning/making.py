"""Stages → Plan: what will be done to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from revify.couplings.shipped import additive
from revify.methods import Method
from revify.planning.blocks import find_blocks
from revify.planning.branching import cut_blocks
from revify.planning.choosing import choose_stages
from revify.planning.grids import choose_grids, with_grid
from revify.planning.halving import split_stages
from revify.planning.refusals import find_refusals
from revify.planning.stages import Stage, channel_axis, find_runs
from revify.planning.transitions import find_checkpoints
from revify.plans import BlockPlan, Plan, StagePlan
from revify.reading.observing import observe
from revify.reading.recording import follow
from revify.reading.tracing import Example, tensors_of
from revify.words import BALANCED, DEFAULT_GRID, SHORT_GRID


def make_plan(model: nn.Module, example: Example, method: Method) -> Plan:
    """Analyse a model and say what would be done to it.

    Args:
        model: any module; it stays as it is.
        example: its inputs, by position or by keyword.
        method: what is asked for.

    Raises:
        RefusalError: the coupling has no inverse, or cannot be parted into single branches.
    """
    observation, graph = observe(model, example), follow(model, example)
    modules = dict(model.named_modules())
    blocks = find_blocks(observation, graph, modules)

    def planned(stage: Stage) -> StagePlan:
        return _stage_plan(stage, method, None)

    runs = find_runs(blocks, graph)
    stages = choose_stages(runs, observation, planned, checkpoints=method.transitions == "checkpoint")
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    plan = Plan(
        model=type(model).__name__,
        architecture=architecture,
        example=tuple(tuple(x.shape) for x in tensors_of(example)),
        grid=DEFAULT_GRID if method.grid == "auto" else method.grid,
        transitions=method.transitions,
        stages=tuple(_stage_plan(stage, method, channel_axis(stage, observation, modules)) for stage in stages),
        checkpointed=(),
        refusals=find_refusals(observation, graph, blocks, stages, modules),
        saved_bytes=observation.saved_bytes,
        traced=f"by a run, since torch.fx could not trace it: {graph.failure}" if graph.failure else "whole",
    )
    if plan.stages and method.grid == "auto":
        plan = choose_grids(plan, model, example)
    elif plan.grid > SHORT_GRID:
        plan = replace(plan, stages=tuple(with_grid(stage, plan.grid) for stage in plan.stages))
    if method.streams == "split":
        plan = split_stages(plan, model, example, method.coupling or additive, observation, graph)
    elif method.unit == "branch":
        plan = cut_blocks(plan, model, example, observation)
    if plan.stages and method.transitions == "checkpoint":
        plan = replace(plan, checkpointed=find_checkpoints(observation, plan))
    return plan


def _stage_plan(stage: Stage, method: Method, axis: int | None) -> StagePlan:
    call = stage.blocks[0].call
    return StagePlan(
        blocks=tuple(
            BlockPlan(
                b.call.path, b.call.kind, b.stream.argument, b.shortcut.value, b.call.saved_bytes, result=b.result
            )
            for b in stage.blocks
        ),
        shape=call.shape,
        dtype=str(call.dtype).removeprefix("torch."),
        stream_bytes=stage.stream_bytes,
        bits=method.first_bits,
        predictor=method.first_predictor,
        sign=method.first_sign,
        pattern=BALANCED,
        axis=axis,
    )
