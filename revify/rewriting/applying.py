"""Plan + model → converted model, and back. The only file that edits modules, and it edits copies.

A converted model is the same tree of the same classes under the same paths. What is new in it: the forward of each block
of a stage is a `Step` (of a checkpointed module a `Checkpointed`), and the root carries the plan as `revify_plan`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from revify.couplings.parts import find_coupling, turns
from revify.errors import RefusalError
from revify.plans import BlockPlan, Plan, StagePlan
from revify.reading.segments import Segment, find_segments
from revify.rewriting.branches import chain_rule, make_branches
from revify.rewriting.cutting import apply_cuts
from revify.rewriting.forecasts import blank_forecast, drop_forecast, forecast_names, hold_forecast
from revify.runtime.arguments import with_stream
from revify.runtime.grid import Grid
from revify.runtime.halves import Chained
from revify.runtime.predictors import make_predictor
from revify.runtime.recomputing import Checkpointed
from revify.runtime.steps import Step
from revify.runtime.tape import StageRule
from revify.words import CALIBRATED

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares parameters, buffers and hook functions with the model."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for name in HOOKS:
            memo.update({id(hook): hook for hook in getattr(module, name).values()})
    return copy.deepcopy(model, memo)


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
    _check_fits(model, plan)
    converted = share(model)
    for stage in plan.stages:
        if stage.coupling:
            _install_halves(converted, stage, plan)
            continue
        _install(converted, stage, plan.grid_of(stage), forecasts or {}, trainable)
    for checkpoint in plan.checkpointed:
        for path, following in zip_longest(checkpoint.paths, checkpoint.joined):
            module = converted.get_submodule(path)
            module.forward = Checkpointed(module, path, following)
    converted.revify_plan = plan  # type: ignore[assignment]  # a plain attribute; nn.Module types all as modules
    return converted


def change_bits(model: nn.Module, plan: Plan) -> None:
    """Give a converted model, in place, the bits of another plan of the same stages.

    Args:
        model: converted, with full streams; no forward pass of it may wait for its backward.
        plan: like the model's own but for the bits.
    """
    for stage in plan.stages:
        rule = _rule(stage, plan.grid_of(stage))
        for step in (step for block in stage.blocks for step in _steps(model.get_submodule(block.path))):
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
    for module in plain.modules():
        if isinstance(module.__dict__.get("forward"), Step | Steps | Checkpointed):
            del module.forward
            drop_forecast(module)
    del plain.revify_plan
    return plain


def _install(
    model: nn.Module,
    stage: StagePlan,
    grid: Grid,
    forecasts: Mapping[str, dict[str, Tensor]],
    trainable: bool,
) -> None:
    rule = _rule(stage, grid)
    index = 0
    for block in stage.blocks:
        module = model.get_submodule(block.path)
        if index > 0 and stage.predictor in CALIBRATED:
            assert stage.axis is not None  # only stages with a known axis are calibrated
            like = next(module.parameters())
            tensors = forecasts.get(block.path) or blank_forecast(
                stage.predictor, stage.shape[stage.axis], stage.rank, like
            )
            hold_forecast(module, tensors, trainable=trainable)
        predictor = make_predictor(stage.predictor, module, stage.axis, grid)
        steps = tuple(
            Step(module, rule, index + number, predictor, block.stream, transform, block.result)
            for number, transform in enumerate(_transforms(module, block))
        )
        index += len(steps)
        module.forward = steps[0] if len(steps) == 1 else Steps(steps)


def _rule(stage: StagePlan, grid: Grid) -> StageRule:
    return StageRule(stage.steps, stage.step_bits, grid, stage.sign)


def _steps(block: nn.Module) -> tuple[Step, ...]:
    """The steps that stand in for a block's forward."""
    forward = block.__dict__.get("forward")
    return forward.steps if isinstance(forward, Steps) else (forward,) if isinstance(forward, Step) else ()


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
        module.forward = Chained(module, rule, index, branches, block.stream)


class Steps:
    """Stands in for the forward of a block that is cut into branches: one step for each.

    Args:
        steps: in order.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # Any: side inputs of every type pass through
        stream = self.steps[0].stream
        z = self.steps[0](*args, **kwargs)
        for step in self.steps[1:]:
            args, kwargs = with_stream(stream, z, args, kwargs)
            z = step(*args, **kwargs)
        return z


def _transforms(module: nn.Module, block: BlockPlan) -> tuple[Segment | None, ...]:
    """What the steps of a block compute; None for its whole forward."""
    if not block.branch_bytes:
        return (None,)
    segments = find_segments(module, block.stream, block.inputs)
    if len(segments) != len(block.branch_bytes):
        raise RefusalError(
            f"the plan cuts {block.path} into {len(block.branch_bytes)} branches, but its forward has {len(segments)}. The "
            "plan was made for another version of this block: make one with revify.plan(model)."
        )
    return segments


def _check_fits(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for block in (b for stage in plan.stages for b in stage.blocks):
        kind = type(modules[block.path]).__name__ if block.path in modules else "nothing"
        if kind != block.kind:
            raise RefusalError(
                f"{type(model).__name__}: the plan expects a {block.kind} at {block.path}, but there is {kind} there. The "
                "plan was made for another architecture: make one with revify.plan(model)."
            )
        if "forward" in vars(modules[block.path]):
            raise RefusalError(
                f"{type(model).__name__}: the forward of {block.path} was replaced on the instance, so revify cannot run "
                "the block by its class. Put the function into the class, or remove it before converting."
            )
    for checkpoint in plan.checkpointed:
        for path in checkpoint.paths:
            if path not in modules:
                raise RefusalError(
                    f"{type(model).__name__}: the plan checkpoints {path}, which the model does not have. The plan "
                    "was made for another architecture: make one with revify.plan(model)."
                )
