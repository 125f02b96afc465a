"""unit="branch": a plan whose blocks are cut into their residual branches, each a step of its own.

Only one branch's activations then live at a time, not a whole block's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from revify.plans import Plan
from revify.reading.copying import copy_tree
from revify.reading.flows import device_of, holds_data, with_data
from revify.reading.observing import Observation
from revify.reading.segments import Segment, find_segments
from revify.reading.tracing import Example, call_with, copy_with_data, each_of, meta_copy
from revify.runtime.arguments import with_stream
from revify.stage_plans import BlockPlan, StagePlan


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
    for block in (block for stage in plan.stages if stage.within is None for block in stage.blocks):
        if block.shortcut in ("identity", "scaled") and block.run is None:
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
    """The paths of the blocks whose segments, one after the other, give what the block gives.

    Values are compared, bit for bit, in train and in eval mode; of a model without data only shapes and types.

    Args:
        model: the plain model, of which a copy runs.
        example: its inputs.
        cut: the segments of some of its blocks.
    """
    if not cut:
        return set()
    if not holds_data(model):
        empty = each_of(example, lambda x: torch.empty_like(x, device="meta"))
        return _proven(meta_copy(model), empty, cut)
    given = with_data(example, device_of(model))
    try:
        trained = _proven(copy_with_data(model), given, cut)
        return trained & _proven(copy_with_data(model).eval(), given, cut)
    except Exception:  # analysed without data, a model may not run with them here: half precision on a CPU
        return set()


def _proven(model: nn.Module, example: Example, cut: Mapping[str, tuple[Segment, ...]]) -> set[str]:
    trials = {path: _Trial(model.get_submodule(path), segments) for path, segments in cut.items()}
    for trial in trials.values():
        trial.block.forward = trial
    with torch.random.fork_rng(devices=_random_devices(model)), torch.no_grad():
        call_with(model, example)
    return {path for path, trial in trials.items() if trial.good}


class _Trial:
    """Stands in for the forward of a block: runs its segments and the block, and notes whether they give the same."""

    def __init__(self, block: nn.Module, segments: tuple[Segment, ...]) -> None:
        self.block, self.segments, self.good = block, segments, False
        self._twin = copy_tree(
            block, {id(p): p for p in block.parameters()}, Tensor.detach
        )  # with the buffers as they are now
        self._devices = _random_devices(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.segments[0].stream
        x = args[stream] if isinstance(stream, int) else kwargs[stream]
        with torch.random.fork_rng(devices=self._devices):
            found = self._run(x, args, kwargs)
        whole = type(self.block).forward(self.block, *args, **kwargs)
        self.good = found is not None and _same(found, whole)
        return whole

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What the segments give, None where a value between them is no stream value."""
        before, z = x._version, x
        try:
            for segment in self.segments:
                given, named = with_stream(segment.stream, z, args, kwargs)
                following = segment(self._twin, *given, **named)
                if (following.shape, following.dtype, z._version) != (x.shape, x.dtype, before):
                    return None
                z, before = following, following._version
        except Exception:  # a segment runs a block's own code in a way that it was not written for
            return None
        return z


def _same(found: Tensor, whole: object) -> bool:
    if not isinstance(whole, Tensor) or (found.shape, found.dtype) != (whole.shape, whole.dtype):
        return False
    return found.is_meta or torch.equal(found, whole)


def _random_devices(module: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in module.parameters() if p.device.type == "cuda"}, key=str)


def _saved(block: BlockPlan, segments: tuple[Segment, ...], observation: Observation) -> tuple[int, ...]:
    """What autograd saves in each segment; what lies between the child modules counts to the last."""
    children = {call.path: call.saved_bytes for call in observation.calls}
    modules = [{s.target for s in segment.operations if s.kind == "call_module"} for segment in segments]
    saved = [sum(children.get(f"{block.path}.{target}", 0) for target in targets) for targets in modules]
    return (*saved[:-1], block.saved_bytes - sum(saved[:-1]))
