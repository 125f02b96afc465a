"""unit="branch": a plan whose blocks are cut into their residual branches, each a step of its own.

Only one branch's activations then live at a time, not a whole block's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from revify.plans import BlockPlan, Plan, StagePlan
from revify.reading.observing import Observation
from revify.reading.segments import Segment, find_segments
from revify.reading.tracing import Example, meta_copy
from revify.runtime.arguments import with_stream


def cut_blocks(plan: Plan, model: nn.Module, example: Example, observation: Observation) -> Plan:
    """The plan with every pre-norm block cut at its residual additions, where that can be done.

    Args:
        plan: of the model, by blocks.
        model: the plain model; it stays as it is.
        example: its inputs.
        observation: of the model on them.
    """
    inputs = {call.path: tuple(i.argument for i in call.inputs) for call in observation.calls}
    cut: dict[str, tuple[Segment, ...]] = {}
    for block in (block for stage in plan.stages for block in stage.blocks):
        if block.shortcut in ("identity", "scaled"):
            cut[block.path] = find_segments(model.get_submodule(block.path), block.stream, inputs[block.path])
    proven = prove(model, example, {path: segments for path, segments in cut.items() if segments})

    def with_branches(block: BlockPlan) -> BlockPlan:
        if block.path not in proven:
            return block
        return replace(block, branch_bytes=_saved(block, cut[block.path], observation), inputs=inputs[block.path])

    def with_blocks(stage: StagePlan) -> StagePlan:
        return replace(stage, blocks=tuple(map(with_branches, stage.blocks)))

    return replace(plan, stages=tuple(map(with_blocks, plan.stages)))


def prove(model: nn.Module, example: Example, cut: Mapping[str, tuple[Segment, ...]]) -> set[str]:
    """The paths of the blocks whose segments run, one after the other, and keep the stream's shape.

    Args:
        model: the plain model, of which a copy runs.
        example: its inputs.
        cut: the segments of some of its blocks.
    """
    keywords = isinstance(example, Mapping)
    given = dict(example) if isinstance(example, Mapping) else dict(enumerate(example))
    try:
        empty = {name: torch.empty_like(x, device="meta") for name, x in given.items()}
        return _proven(meta_copy(model), empty, cut, keywords=keywords)
    except Exception:  # any operation may lack a meta kernel: the real run decides
        return _proven(copy.deepcopy(model), given, cut, keywords=keywords)


def _proven(
    model: nn.Module, example: Mapping[Any, Tensor], cut: Mapping[str, tuple[Segment, ...]], *, keywords: bool
) -> set[str]:
    trials = {path: _Trial(model.get_submodule(path), segments) for path, segments in cut.items()}
    for trial in trials.values():
        trial.block.forward = trial
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model(**example) if keywords else model(*example.values())
    return {path for path, trial in trials.items() if trial.good}


class _Trial:
    """Stands in for the forward of a block: runs its segments, and notes whether they are good for steps."""

    def __init__(self, block: nn.Module, segments: tuple[Segment, ...]) -> None:
        self.block, self.segments, self.good = block, segments, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        whole = type(self.block).forward(self.block, *args, **kwargs)
        stream = self.segments[0].stream
        x = args[stream] if isinstance(stream, int) else kwargs[stream]
        before, z = x._version, x
        try:
            for segment in self.segments:
                given, named = with_stream(stream, z, args, kwargs)
                following = segment(self.block, *given, **named)
                if (following.shape, following.dtype, z._version) != (x.shape, x.dtype, before):
                    return whole
                z, before = following, following._version
            self.good = z.shape == whole.shape
        except Exception:  # a segment runs a block's own code in a way that it was not written for
            return whole
        return whole


def _saved(block: BlockPlan, segments: tuple[Segment, ...], observation: Observation) -> tuple[int, ...]:
    """What autograd saves in each segment; what lies between the child modules counts to the last."""
    children = {call.path: call.saved_bytes for call in observation.calls}
    modules = [{s.target for s in segment.operations if s.kind == "call_module"} for segment in segments]
    saved = [sum(children.get(f"{block.path}.{target}", 0) for target in targets) for targets in modules]
    return (*saved[:-1], block.saved_bytes - sum(saved[:-1]))
