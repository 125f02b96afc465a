"""Plan + model → nothing, or a refusal: whether everything that the plan names is in the model, before anything is edited."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import Tensor, nn

from revify.errors import RefusalError
from revify.plans import Plan
from revify.stage_plans import BlockPlan, Side, StagePlan
from revify.words import CALIBRATED


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        RefusalError: the model has other modules, arguments or channels than the plan names.
    """
    modules = dict(model.named_modules())
    for stage in plan.stages:
        if stage.within is not None and stage.within not in modules:
            raise RefusalError(
                f"{type(model).__name__}: the plan names the module {stage.within}, which the model does not have. The plan "
                "was made for another architecture: make one with revify.plan(model)."
            )
        for block in stage.blocks:
            for fault in _faults(stage, block, modules):
                raise RefusalError(
                    f"{type(model).__name__}: {fault}. The plan was made for another architecture: make one with "
                    "revify.plan(model)."
                )
            if "forward" in vars(modules[block.path]) and (block.branch_bytes or block.split_branches):
                raise RefusalError(
                    f"{type(model).__name__}: the forward of {block.path} was replaced on the instance, so revify cannot cut "
                    'the block by its class. Plan with unit="block", put the function into the class, or take it away.'
                )
    for checkpoint in plan.checkpointed:
        for path in checkpoint.paths:
            if path not in modules:
                raise RefusalError(
                    f"{type(model).__name__}: the plan checkpoints {path}, which the model does not have. The plan "
                    "was made for another architecture: make one with revify.plan(model)."
                )


def _faults(stage: StagePlan, block: BlockPlan, modules: dict[str, nn.Module]) -> Iterator[str]:
    """What the plan says of a block that is not so."""
    module = modules.get(block.path)
    kind = "nothing" if module is None else type(module).__name__
    if module is None or kind != block.kind:
        yield f"the plan expects a {block.kind} at {block.path}, but there is {kind} there"
        return
    if block.run is None and not _takes(module, block.stream, named=bool(block.branch_bytes or block.split_branches)):
        yield f"the plan has the stream of {block.path} as its argument {block.stream!r}, which it does not take"
    if stage.axis is None or not (stage.coupling or stage.predictor in CALIBRATED):
        return
    channels = stage.shape[stage.axis]
    if not any(channels in parameter.shape for parameter in module.parameters()):
        yield f"the plan gives {block.path} {channels} channels, but none of its parameters has so many"
    for branch in block.split_branches:
        for cut in branch.cuts:
            if not _has(module, cut.path, cut.side, channels):
                yield f"the plan cuts {cut.path} in {block.path}, where there is nothing with {channels} channels"


def _takes(module: nn.Module, argument: int | str, *, named: bool) -> bool:
    """Whether a module's forward takes an argument, by a name of its own where its code is to be read."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # it is not written in Python, and says nothing
        return True
    if isinstance(argument, str):
        names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return argument in names or (not named and any(p.kind is p.VAR_KEYWORD for p in parameters))
    places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return argument < places or (not named and any(p.kind is p.VAR_POSITIONAL for p in parameters))


def _has(block: nn.Module, path: str, side: Side, channels: int) -> bool:
    """Whether a block has the layer, or the parameter, that is to be cut."""
    layers = dict(block.named_modules())
    if side is not Side.VALUE:
        return path in layers
    owner, _, name = path.rpartition(".")
    value = getattr(layers[owner], name, None) if owner in layers else None
    return isinstance(value, Tensor) and channels in value.shape
