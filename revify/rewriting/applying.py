"""Plan + model → converted model, and back: on a copy that shares its tensors, or in place. The only file that edits modules.

A converted model is the same tree of the same classes under the same paths. What is new in it: the forward of each block
of a stage is a `Step` (of a checkpointed module a `Checkpointed`), and the root carries the plan as `revify_plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from revify.couplings.parts import find_coupling, turns
from revify.errors import RefusalError
from revify.plans import Plan
from revify.reading.copying import HOOKS, copy_tree, exchange
from revify.reading.programs import Part
from revify.reading.roles import Shortcut
from revify.reading.segments import Segment, find_segments
from revify.rewriting.branches import chain_rule, make_branches
from revify.rewriting.cutting import apply_cuts
from revify.rewriting.fitting import check_fits
from revify.rewriting.forecasts import blank_forecast, drop_forecast, forecast_names, hold_forecast
from revify.rewriting.programs import Programmed, programmed
from revify.rewriting.replicas import Replicator
from revify.rewriting.restoring import unless_it_fails
from revify.rewriting.switches import set_switches, unset_switches
from revify.runtime.apart import ApartStep, Opening
from revify.runtime.coded import CodedRule, CodedStep
from revify.runtime.grid import Grid
from revify.runtime.halves import Chained
from revify.runtime.predictors import make_predictor
from revify.runtime.recomputing import Checkpointed
from revify.runtime.standing_in import StandIn
from revify.runtime.steps import Step, Steps
from revify.runtime.tape import StageRule
from revify.stage_plans import BlockPlan, StagePlan
from revify.words import CALIBRATED

Transform = Segment | Part | None  # what a step computes; None for the whole forward of its block
_REPLICATE = "_replicate_for_data_parallel"  # by which nn.DataParallel copies a module


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares parameters, buffers and hook functions with the model."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for name in HOOKS:
            memo.update({id(hook): hook for hook in getattr(module, name).values()})
    return copy_tree(model, memo)


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    forecasts: Mapping[str, dict[str, Tensor]] | None = None,
    trainable: bool = False,
) -> nn.Module:
    """Do what the plan says to a copy of the model that shares its parameters and buffers.

    Args:
        model: the plain model, which stays as it is.
        plan: made for this architecture.
        forecasts: what was fitted for calibrated predictors, by block path; without it they start as q = z.
        trainable: hold the forecasts as parameters.

    Returns:
        The converted model.

    Raises:
        RefusalError: the model has other modules than the plan names.
    """
    check_fits(model, plan)
    converted = share(model)
    _edit(converted, plan, forecasts or {}, trainable=trainable)
    return converted


def install_plan(
    model: nn.Module,
    plan: Plan,
    *,
    forecasts: Mapping[str, dict[str, Tensor]] | None = None,
    trainable: bool = False,
) -> None:
    """Do what the plan says to the model itself; after an error it is as it was. Arguments as for `apply_plan`."""
    check_fits(model, plan)
    with unless_it_fails(model):
        _edit(model, plan, forecasts or {}, trainable=trainable)


def _edit(model: nn.Module, plan: Plan, forecasts: Mapping[str, dict[str, Tensor]], *, trainable: bool) -> None:
    for stage in sorted(plan.stages, key=lambda stage: stage.within is not None):  # forwards are cut first
        if stage.coupling:
            _install_halves(model, stage, plan)
        elif stage.step == "coded":
            for run in stage.runs:
                _install_coded(model, stage, run, plan)
        else:
            _install(model, stage, plan.grid_of(stage), forecasts, trainable)
    for checkpoint in plan.checkpointed:
        for path, following in zip_longest(checkpoint.paths, checkpoint.joined):
            module = model.get_submodule(path)
            joins, compares = path != checkpoint.path, plan.guard == "bits"
            _put(module, Checkpointed(module, path, following, joins=joins, compares=compares))
    set_switches(model)
    model.revify_plan = plan  # type: ignore[assignment]  # a plain attribute; nn.Module types all as modules


def change_bits(model: nn.Module, plan: Plan) -> None:
    """Give a converted model, in place, the bits of another plan of the same stages.

    Args:
        model: converted, with full streams; no forward pass of it may wait for its backward.
        plan: like the model's own but for the bits.
    """
    for stage in plan.stages:
        opening = None if stage.within is None else vars(model.get_submodule(stage.within)).get("forward")
        for run in stage.runs:
            rule = _coded_rule(stage, run, plan) if stage.step == "coded" else _rule(stage, plan.grid_of(stage))
            steps = [step for block in run for step in _steps(model.get_submodule(block.path), block)]
            if isinstance(opening, Opening) and isinstance(rule, CodedRule):
                opening.rules = tuple(rule if known is steps[0].rule else known for known in opening.rules)
            for step in steps:
                step.rule = rule
    model.revify_plan = plan  # type: ignore[assignment]  # a plain attribute; nn.Module types all as modules


def copy_forecasts(model: nn.Module, source: nn.Module) -> None:
    """Give a converted model, in place, the fitted predictors of another conversion with the same ones."""
    with torch.no_grad():
        for part, other in zip(model.modules(), source.modules(), strict=True):
            for name in forecast_names(part):
                getattr(part, name).copy_(getattr(other, name))


def remove_plan(model: nn.Module) -> nn.Module:
    """The plain module tree of a converted model, sharing its parameters and buffers."""
    plain = share(model)
    uninstall_plan(plain)
    return plain


def uninstall_plan(model: nn.Module) -> None:
    """Take what a plan put into a model out of it, in place; after an error the model is as it was."""
    with unless_it_fails(model):
        forwards: dict[int, Any] = {}
        for module in model.modules():
            replicator = vars(module).pop(_REPLICATE, None)
            if not isinstance(replicator, Replicator):
                continue
            stand_in = replicator.stand_in
            forwards[id(stand_in)] = stand_in.own or MethodType(type(module).forward, module)
            if vars(module).get("forward") is stand_in:
                del module.forward
                if stand_in.own:
                    module.forward = stand_in.own
            drop_forecast(module)
        exchange(model, forwards)  # in what was wrapped since
        unset_switches(model)
        del model.revify_plan


def _put(module: nn.Module, stand_in: StandIn) -> None:
    """Let a stand-in stand in for the forward of its module."""
    module.forward = stand_in
    module.__dict__[_REPLICATE] = Replicator(stand_in)


def _install(
    model: nn.Module,
    stage: StagePlan,
    grid: Grid,
    forecasts: Mapping[str, dict[str, Tensor]],
    trainable: bool,
) -> None:
    rule = _rule(stage, grid)

    def step(module: nn.Module, index: int, block: BlockPlan, transform: Transform) -> Step:
        predictor = make_predictor(stage.predictor, module, stage.axis, grid)
        return Step(module, rule, index, block.stream, transform, block.result, predictor=predictor)

    for number, block in enumerate(stage.blocks):
        module = model.get_submodule(block.path)
        if number > 0 and stage.predictor in CALIBRATED:
            assert stage.axis is not None  # only stages with a known axis are calibrated
            like = next(module.parameters())
            tensors = forecasts.get(block.path) or blank_forecast(
                stage.predictor, stage.shape[stage.axis], stage.rank, like
            )
            hold_forecast(module, tensors, trainable=trainable)
    _put_steps(model, stage.blocks, step)


def _install_coded(model: nn.Module, stage: StagePlan, run: Sequence[BlockPlan], plan: Plan) -> None:
    rule = _coded_rule(stage, run, plan)
    if stage.within is not None:
        _install_apart(model, stage, stage.within, rule)
        return

    def step(module: nn.Module, index: int, block: BlockPlan, transform: Transform) -> CodedStep:
        return CodedStep(module, rule, index, block.stream, transform, block.result)

    _put_steps(model, run, step)


def _put_steps(
    model: nn.Module, blocks: Sequence[BlockPlan], step: Callable[[nn.Module, int, BlockPlan, Transform], Any]
) -> None:  # Any: steps of one kind or the other
    """Let steps stand in for these blocks, or for their parts, in the order in which they run."""
    index = 0
    for block in blocks:
        module = model.get_submodule(block.path)
        container = None if block.run is None else programmed(module, block)
        transforms = _transforms(module, block, container)
        steps = tuple(step(module, index + number, block, transform) for number, transform in enumerate(transforms))
        index += len(steps)
        _put(module, _standing_in(module, block, container, steps))


def _install_apart(model: nn.Module, stage: StagePlan, within: str, rule: CodedRule) -> None:
    """Coded steps with something between them, and what opens a pass for them."""
    for index, block in enumerate(stage.blocks):
        module = model.get_submodule(block.path)
        adds = block.shortcut == Shortcut.IDENTITY
        step = ApartStep(module, rule, index, block.stream, result=block.result)
        step.adds = adds
        _put(module, step)
    module = model.get_submodule(within)
    known = vars(module).get("forward")
    opening = known if isinstance(known, Opening) else Opening(module, within or "the forward of the model")
    opening.rules = (*opening.rules, rule)
    _put(module, opening)


def _standing_in(
    module: nn.Module, block: BlockPlan, container: Programmed | None, steps: tuple[Any, ...]
) -> StandIn:  # Any: steps of one kind or the other
    """What stands in for a block's forward: its step, its steps, or the program that has them among its operations."""
    if container is not None and block.run is not None:
        container.runs[block.run] = steps
        return container
    only: StandIn = steps[0] if len(steps) == 1 else Steps(module, steps)
    return only


def _coded_rule(stage: StagePlan, run: Sequence[BlockPlan], plan: Plan) -> CodedRule:
    return CodedRule(tuple(name for block in run for name in block.steps), stage.bits, plan.guard == "bits")


def _rule(stage: StagePlan, grid: Grid) -> StageRule:
    return StageRule(stage.steps, stage.step_bits, grid, stage.sign, stage.pattern, stage.copied)


def _steps(module: nn.Module, block: BlockPlan) -> tuple[Any, ...]:  # Any: of one kind or the other
    """The steps that stand in for a block's forward, or for a run of it."""
    replicator = vars(module).get(_REPLICATE)
    stand_in = replicator.stand_in if isinstance(replicator, Replicator) else None
    if isinstance(stand_in, Programmed):
        return stand_in.runs[block.run or 0]
    if isinstance(stand_in, Steps):
        return stand_in.steps
    return (stand_in,) if isinstance(stand_in, Step | CodedStep) else ()


def _install_halves(model: nn.Module, stage: StagePlan, plan: Plan) -> None:
    """Cut the blocks of a split stage, and let their branches run between its halves."""
    assert stage.axis is not None  # only stages with a known axis are split
    channels = stage.shape[stage.axis]
    order = turns(find_coupling(stage.coupling, plan.couplings), len(stage.steps))
    rule = chain_rule(stage, order, plan.grid_of(stage))
    rest = iter(order)
    for index, block in enumerate(stage.blocks):
        module = model.get_submodule(block.path)
        apply_cuts(module, tuple(cut for half in block.split_branches for cut in half.cuts), channels)
        own = tuple(next(rest) for _ in block.split_branches)
        branches = make_branches(module, block, rule, index, own)
        _put(module, Chained(module, rule, index, branches, block.stream))


def _transforms(module: nn.Module, block: BlockPlan, container: Programmed | None) -> tuple[Transform, ...]:
    """What the steps of a block compute; None for its whole forward."""
    if container is not None:
        return container.parts(block.run or 0)
    if not block.branch_bytes:
        return (None,)
    segments = find_segments(module, block.stream, block.inputs)
    if len(segments) != len(block.branch_bytes):
        raise RefusalError(
            f"the plan cuts {block.path} into {len(block.branch_bytes)} branches, but its forward has {len(segments)}. The "
            "plan was made for another version of this block: make one with revify.plan(model)."
        )
    return segments
