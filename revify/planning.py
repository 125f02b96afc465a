"""Stages → Plan: what will be done to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from revify.blocks import find_blocks
from revify.observing import Observation, observe
from revify.plans import BlockPlan, CheckpointPlan, Plan, StagePlan
from revify.recording import follow
from revify.refusals import find_refusals, parents
from revify.stages import Stage, channel_axis, group_stages
from revify.tracing import Example, tensors_of

WORTH_A_RERUN = 0.005  # of the model's saved bytes, that checkpointing a module outside of the stages must save


def make_plan(
    model: nn.Module,
    example: Example,
    *,
    bits: int,
    predictor: str,
    grid: int,
    transitions: str,
) -> Plan:
    """Analyse a model and say what would be done to it.

    Args:
        model: any module; it stays as it is.
        example: its inputs, by position or by keyword.
        bits: residue bits for every stage.
        predictor: for every stage.
        grid: resolution of the grid.
        transitions: "keep" or "checkpoint".
    """
    observation, graph = observe(model, example), follow(model, example)
    modules = dict(model.named_modules())
    blocks = find_blocks(observation, graph, modules)
    stages = group_stages(blocks, graph)
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    return Plan(
        model=type(model).__name__,
        architecture=architecture,
        example=tuple(tuple(x.shape) for x in tensors_of(example)),
        grid=grid,
        transitions=transitions,
        stages=tuple(
            _stage_plan(stage, bits, predictor, channel_axis(stage, observation, modules)) for stage in stages
        ),
        checkpointed=_transitions(observation, stages) if stages and transitions == "checkpoint" else (),
        refusals=find_refusals(observation, graph, blocks, stages, modules),
        saved_bytes=observation.saved_bytes,
        traced=f"by a run, since torch.fx could not trace it: {graph.failure}" if graph.failure else "whole",
    )


def _stage_plan(stage: Stage, bits: int, predictor: str, axis: int | None) -> StagePlan:
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
        bits=bits,
        predictor=predictor,
        axis=axis,
    )


def _transitions(observation: Observation, stages: tuple[Stage, ...]) -> tuple[CheckpointPlan, ...]:
    """The largest modules without a stage in them that hold much more than their inputs: what pays."""
    inside = {b.call.path for stage in stages for b in stage.blocks}
    above = {parent for path in inside for parent in parents(path)} | {""}
    counts = Counter(call.path for call in observation.calls)
    found: list[CheckpointPlan] = []
    for call in observation.calls:
        called = [parent for parent in parents(call.path) if counts[parent]]
        largest = call.path not in inside | above and above.issuperset(called)
        simple = (
            (call.output is not None or call.results)
            and counts[call.path] == 1
            and not any(i.changed for i in call.inputs)
        )
        if largest and simple:
            held = sum(_bytes(i.shape, i.dtype.itemsize) for i in call.inputs)
            if call.saved_bytes - held > WORTH_A_RERUN * observation.saved_bytes:
                found.append(CheckpointPlan(call.path, call.saved_bytes, held))
    return tuple(found)


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    for size in shape:
        itemsize *= size
    return itemsize
