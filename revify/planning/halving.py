"""streams="split": a plan whose stages run on the two halves of their channels, with the blocks' branches as F and G.

    block ─┬─ its branches, told apart ─── cut to half the width, or lifted
           └─ or the whole block ───────── lifted whole: T(x) − x

Every branch is run on half the channels before it enters the plan: what does not give the other half is lifted, and
what cannot be lifted is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revify.couplings.formulas import Formula
from revify.couplings.parts import SHIPPED, Turn, coupling_name, half_range, turns
from revify.planning.cuts import find_cuts
from revify.plans import Plan, Refusal
from revify.reading.additions import find_joints
from revify.reading.copying import copy_tree
from revify.reading.observing import Observation
from revify.reading.segments import BranchCode, find_branches
from revify.reading.tracing import Example, Trace, call_with, run_copy
from revify.rewriting.branches import Branch, chain_rule, make_branches
from revify.rewriting.cutting import apply_cuts
from revify.runtime.arguments import with_stream
from revify.runtime.grid import Grid
from revify.runtime.halves import ChainRule
from revify.stage_plans import CUT, LIFTED, NO_PREDICTOR, WHOLE, BlockPlan, BranchPlan, Cut, StagePlan


def split_stages(
    plan: Plan, model: nn.Module, example: Example, formula: Formula, observation: Observation, graph: Trace
) -> Plan:
    """The plan with every stage split into two streams, where that can be done.

    Args:
        plan: of the model, by blocks.
        model: the plain model; it stays as it is.
        example: its inputs.
        formula: the coupling.
        observation: of the model on its inputs.
        graph: of the model.

    Raises:
        RefusalError: the coupling has no inverse, or cannot be parted into single branches.
    """
    name = coupling_name(formula)
    inputs = {call.path: tuple(i.argument for i in call.inputs) for call in observation.calls}
    tied = _tied(model)
    found = {
        b.path: find_branches(model.get_submodule(b.path), b.stream, inputs[b.path])
        for stage in plan.stages
        for b in stage.blocks
    }
    running = _running(found, model, example)
    stages: list[StagePlan] = []
    orders: list[tuple[Turn, ...]] = []
    refusals = list(plan.refusals)
    for stage in plan.stages:
        codes = {b.path: found[b.path] if b.path in running else () for b in stage.blocks}
        refused = list(_refusals(stage, codes))
        if refused:
            refusals += refused
            continue
        assert stage.axis is not None  # else it was refused
        order = turns(formula, sum(len(codes[b.path]) or 1 for b in stage.blocks))
        halved = _first_plan(stage, codes, order, graph, tied)
        halved = replace(halved, coupling=name, predictor=NO_PREDICTOR, bits=0)
        halved = replace(halved, blocks=tuple(replace(b, inputs=inputs[b.path]) for b in halved.blocks))
        stages.append(halved)
        orders.append(order)
    grids = [plan.grid_of(stage) for stage in stages]
    proven = _proven(stages, model, example, orders, grids) if stages else ()
    return replace(plan, stages=proven, refusals=tuple(refusals), couplings=() if formula in SHIPPED else (formula,))


def _running(codes: Mapping[str, tuple[BranchCode, ...]], model: nn.Module, example: Example) -> set[str]:
    """The paths of the blocks whose branches, told apart, run at full width on what the blocks are called with."""

    def work(copied: nn.Module, given: Example) -> set[str]:
        trials = {path: _CodeTrial(copied.get_submodule(path), code) for path, code in codes.items() if code}
        for trial in trials.values():
            trial.block.forward = trial
        call_with(copied, given)
        return {path for path, trial in trials.items() if trial.runs}

    return run_copy(model, example, work) if any(codes.values()) else set()


@dataclass(slots=True)
class _CodeTrial:
    """Stands in for the forward of a block, and runs its branches beside it."""

    block: nn.Module
    codes: tuple[BranchCode, ...]
    runs: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.codes[0].run.stream
        x = args[stream] if isinstance(stream, int) else kwargs[stream]
        for code in self.codes:
            try:
                given, named = with_stream(stream, x.clone(), args, kwargs)
                self.runs &= code.run(self.block, *given, **named).shape == x.shape
            except Exception:  # for example an argument that is not its default: the block stays whole
                self.runs = False
        return type(self.block).forward(self.block, *args, **kwargs)


def _refusals(stage: StagePlan, codes: dict[str, tuple[BranchCode, ...]]) -> Iterator[Refusal]:
    """Why a stage cannot be split."""
    remedy = 'use streams="full" for this model'
    first = stage.blocks[0].path
    if stage.axis is None:
        yield Refusal(first, "no layer tells which axis of its stream holds the channels", remedy)
    elif stage.shape[stage.axis] < 2:
        yield Refusal(first, "its stream has one channel", remedy)
    for block in stage.blocks:
        if block.result is not None:
            yield Refusal(block.path, "it returns several results", remedy)
        elif block.shortcut == "post-norm":
            yield Refusal(block.path, "a norm stands on its shortcut, which would have to be undone", remedy)
        elif block.shortcut == "post-activation" and not codes[block.path]:
            reason = "an activation stands on its shortcut, and its branch could not be told apart from it"
            yield Refusal(block.path, reason, remedy)


def _first_plan(
    stage: StagePlan,
    codes: dict[str, tuple[BranchCode, ...]],
    order: tuple[Turn, ...],
    graph: Trace,
    tied: set[str],
) -> StagePlan:
    """Every branch cut where the graph says how, else lifted."""
    blocks = []
    rest = iter(order)
    assert stage.axis is not None  # the caller asked
    for block in stage.blocks:
        own = [next(rest) for _ in codes[block.path] or (None,)]
        if not codes[block.path]:
            blocks.append(replace(block, split_branches=(BranchPlan(WHOLE, (), block.saved_bytes),)))
            continue
        halves: list[BranchPlan] = []
        for cuts in _cuts(block, own, graph, stage.shape[stage.axis]):
            clash = any(_clash(cut, other) for cut in cuts or () for half in halves for other in half.cuts)
            outside = any(f"{block.path}.{cut.path}" in tied for cut in cuts or ())
            halves.append(BranchPlan(LIFTED if cuts is None or clash or outside else CUT, cuts or (), 0))
        blocks.append(replace(block, split_branches=tuple(h if h.how == CUT else replace(h, cuts=()) for h in halves)))
    return replace(stage, blocks=tuple(blocks))


def _cuts(block: BlockPlan, own: list[Turn], graph: Trace, channels: int) -> list[tuple[Cut, ...] | None]:
    """For each branch what is cut, None where the graph does not say."""
    call = graph.calls[block.path][0]
    joints = find_joints(call.given(block.stream), call.result(None), graph.modules)
    if len(joints) != len(own):
        return [None for _ in own]
    return [
        find_cuts(joint, block.path, graph.modules, channels, turn.takes, turn.gives)
        for joint, turn in zip(joints, own, strict=True)
    ]


def _clash(one: Cut, other: Cut) -> bool:
    return one.path == other.path and (one.side, one.half) != (other.side, other.half)


def _tied(model: nn.Module) -> set[str]:
    """The paths of layers and parameters that the model uses in more than one place."""
    places: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(path)
    shared = {path for paths in places.values() if len(paths) > 1 for path in paths}
    return shared | {path.rpartition(".")[0] for path in shared}


def _proven(
    stages: list[StagePlan], model: nn.Module, example: Example, orders: list[tuple[Turn, ...]], grids: list[Grid]
) -> tuple[StagePlan, ...]:
    """The stages with every branch lifted that did not run when cut, and what each saves."""

    def work(copied: nn.Module, given: Example) -> tuple[StagePlan, ...]:
        trials: list[list[_Trial]] = []
        for stage, order, grid in zip(stages, orders, grids, strict=True):
            rest, rule = iter(order), chain_rule(stage, order, grid)
            trials.append([])
            for index, block in enumerate(stage.blocks):
                own = tuple(next(rest) for _ in block.split_branches)
                trial = _Trial(copied.get_submodule(block.path), block, rule, index, own)
                trial.block.forward = trial
                trials[-1].append(trial)
        call_with(copied, given)
        return tuple(
            replace(stage, blocks=tuple(trial.plan for trial in own)) for stage, own in zip(stages, trials, strict=True)
        )

    return run_copy(model, example, work)


@dataclass(slots=True)
class _Trial:
    """Stands in for the forward of a block: runs its branches on halves, and lifts what does not fit."""

    block: nn.Module
    plan: BlockPlan
    rule: ChainRule
    index: int
    turns: tuple[Turn, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.plan.stream
        x = args[stream] if isinstance(stream, int) else kwargs[stream]
        for number, half in enumerate(self.plan.split_branches):
            saved = self._saved(number, x, args, kwargs)
            if saved is None and half.how == CUT:
                self._set(number, BranchPlan(LIFTED, (), 0))
                saved = self._saved(number, x, args, kwargs)
            self._set(number, replace(self.plan.split_branches[number], saved_bytes=saved or self.plan.saved_bytes))
        return type(self.block).forward(self.block, *args, **kwargs)

    def _set(self, number: int, half: BranchPlan) -> None:
        halves = self.plan.split_branches
        self.plan = replace(self.plan, split_branches=(*halves[:number], half, *halves[number + 1 :]))

    def _saved(self, number: int, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """What autograd saves in a branch, None where it does not give the right half."""
        block = copy_tree(self.block, {}, Tensor.detach)
        block.__dict__.pop("forward", None)
        cuts = [cut for half in self.plan.split_branches for cut in half.cuts]
        try:
            apply_cuts(block, tuple(cuts), self.rule.channels)
            branch = make_branches(block, self.plan, self.rule, self.index, self.turns)[number]
            return _run(branch, x.detach(), args, kwargs)
        except Exception:  # a cut block runs code that was not written for its width: lifting it is the answer
            return None


def _run(branch: Branch, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The bytes that autograd saves of a branch, None where its result has the wrong shape."""
    turn, rule = branch.turn, branch.rule
    takes, gives = (half_range(half, rule.channels) for half in (turn.takes, turn.gives))
    z = x.narrow(rule.axis, takes.start, takes.stop - takes.start).contiguous().requires_grad_()
    wanted = x.narrow(rule.axis, gives.start, gives.stop - gives.start).shape
    known = {p.untyped_storage()._cdata for p in branch.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(note, lambda saved: saved):
        f = branch(z, args, kwargs)
    f = f[-1] if isinstance(f, tuple) else f
    return sum(found.values()) if f.shape == wanted else None
