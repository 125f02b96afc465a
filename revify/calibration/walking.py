"""What calibration must see of a model: the original's trajectory, what enters each stage, and which positions matter.

survey_original   one pass of the plain model: outputs, what enters each stage, the blocks' side inputs
find_importance   how much the model's output depends on each block's output, and on each position of it
start_walks       every batch at the entrance of a stage, in the converted model so far and in the original
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revify.calibration.batches import Batch, Signature, main_output
from revify.errors import RefusalError
from revify.plans import Plan
from revify.stage_plans import BlockPlan, StagePlan

LOOK = 8  # samples on which it is found what the output depends on
FLOOR = 0.1  # what a position counts at least, where the average counts 1

Side = tuple[tuple[Any, ...], dict[str, Any]]  # Any: side inputs are of every type
Forecasts = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Survey:
    """What the original does with each batch.

    Args:
        outputs: what counts of what it returns.
        arrived: what enters each stage, by the path of its first block.
        sides: the arguments of each block besides the stream, by path.
        importance: for each, how much each block's output counts, by path; batches of the same shapes share it.
    """

    outputs: list[Tensor]
    arrived: list[dict[str, Tensor]]
    sides: list[dict[str, Side]]
    importance: list[dict[str, Importance]]


@dataclass(frozen=True, slots=True)
class Walk:
    """Where one batch of calibration images stands in a stage.

    Args:
        older: z[k-1].
        z: z[k].
        original: x*[k].
        sides: for each block by path, the arguments besides the stream.
        importance: of each block's output, by path.
    """

    older: Tensor
    z: Tensor
    original: Tensor
    sides: dict[str, Side]
    importance: dict[str, Importance]


@dataclass(frozen=True, slots=True)
class Importance:
    """How much the model's output depends on the output of one block.

    Args:
        weights: of its positions, about 1 on average; None where the output does not depend on it.
        energy: mean square of the gradient, per element.
    """

    weights: Tensor | None
    energy: float

    def of(self, positions: int) -> Tensor:
        """Weights for so many positions: of several samples, one after the other."""
        if self.weights is None or positions % len(self.weights):
            return torch.ones(positions)
        return self.weights.repeat(positions // len(self.weights))


def survey_original(
    plain: nn.Module, plan: Plan, batches: list[Batch], importance: list[dict[str, Importance]]
) -> Survey:
    """One pass of the original over the data: its outputs, what enters each stage, and the blocks' other arguments."""
    paths = [planned.path for stage in plan.stages for planned in stage.blocks]
    entrances = {stage.blocks[0].path for stage in plan.stages}
    streams = {planned.path: planned.stream for stage in plan.stages for planned in stage.blocks}
    survey = Survey([], [], [], importance)
    for batch in batches:
        arrived: dict[str, Tensor] = {}
        sides: dict[str, Side] = {}

        def look(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            at = streams[path]
            if path in entrances:
                arrived[path] = args[at] if isinstance(at, int) else kwargs[at]  # noqa: B023
            holed = tuple(None if at == i else a for i, a in enumerate(args))
            sides[path] = (holed, {name: None if at == name else a for name, a in kwargs.items()})  # noqa: B023

        with _watched(plain, paths, look):
            survey.outputs.append(main_output(batch(plain)))
        survey.arrived.append(arrived)
        survey.sides.append(sides)
    return survey


def importance_of_batches(converted: nn.Module, plan: Plan, batches: list[Batch]) -> list[dict[str, Importance]]:
    """For each batch, how much the output depends on each block's output; found once for batches of the same shapes."""
    found: dict[Signature, dict[str, Importance]] = {}
    for batch in batches:
        if batch.signature not in found:
            found[batch.signature] = find_importance(converted, plan, batch.part(0, LOOK))
    return [found[batch.signature] for batch in batches]


def find_importance(converted: nn.Module, plan: Plan, batch: Batch) -> dict[str, Importance]:
    """How much the output depends on each block's output, through the memory-free backward.

    For random signs v of the outputs, v·∂y/∂z has the mean square |∂y/∂z·δ|² for a deviation δ without a direction.
    """
    planned = {block.path: stage for stage in plan.stages for block in stage.blocks}
    grads: dict[str, Tensor] = {}
    leaves = [p for p in converted.parameters() if p.requires_grad]

    def enter(_: str, __: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let what enters the stages of a frozen model have a gradient."""
        new = tuple(_leaf(a, leaves) for a in args)
        return new, {name: _leaf(a, leaves) for name, a in kwargs.items()}

    def remember(path: str, _: nn.Module, args: object, output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[results[path] or 0]
        if value.requires_grad:
            value.register_hook(partial(grads.__setitem__, path))

    results = {block.path: block.result for stage in plan.stages for block in stage.blocks}
    entrances = [] if leaves else [stage.blocks[0].path for stage in plan.stages]
    handles = [converted.get_submodule(path).register_forward_hook(partial(remember, path)) for path in planned]
    try:
        with torch.enable_grad(), _watched(converted, entrances, enter):
            y = main_output(batch(converted))
            signs = torch.randint(0, 2, y.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
            torch.autograd.grad((y * signs.to(y)).sum(), leaves, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, stage in planned.items():
        found[path] = Importance(None, 0.0)
        if path in grads and stage.axis is not None:
            energy = by_position(grads[path].square(), stage.axis).sum(1).view(len(grads[path]), -1).mean(0).double()
            weights = (energy / energy.mean().clamp_min(1e-30)).sqrt().clamp_min(FLOOR).cpu()
            found[path] = Importance(weights, float(grads[path].double().square().mean()))
    return found


def start_walks(
    converted: nn.Module | None, plan: Plan, stage: StagePlan, batches: list[Batch], survey: Survey
) -> list[Walk]:
    """Every batch at the entrance of a stage, in the model converted up to there (None: not at all) and in the original."""
    grid, first = plan.grid_of(stage), stage.blocks[0]
    walks = []
    seen = zip(batches, survey.arrived, survey.sides, survey.importance, strict=True)
    for batch, arrived, sides, importance in seen:
        original = arrived[first.path]
        z = grid.round(original if converted is None else _arriving(converted, first, batch))
        walks.append(Walk(z, z, original, sides, importance))
    return walks


def drawing_signs(converted: nn.Module) -> nn.Module:
    """The same model in eval mode, its blocks of random sign coupled nevertheless: there they would be the plain ones."""
    plan: Plan = converted.revify_plan  # type: ignore[assignment]  # nn.Module promises a Tensor or a Module
    for stage in plan.stages:
        for planned in stage.blocks if stage.sign == "random" else ():
            converted.get_submodule(planned.path).training = True  # of the block alone: its children stay in eval mode
    return converted


def _arriving(model: nn.Module, block: BlockPlan, batch: Batch) -> Tensor:
    """What comes to a block; the rest of the model does not run."""

    def stop(_: str, __: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Arrived(args[block.stream] if isinstance(block.stream, int) else kwargs[block.stream])

    with _watched(model, [block.path], stop):
        try:
            batch(model)
        except _Arrived as arrived:
            return arrived.value
    raise RefusalError(f"{block.path} was not called on the calibration data, though it was on the plan's example.")


def run_block(block: nn.Module, planned: BlockPlan, z: Tensor, side: Side) -> Tensor:
    """What a block makes of a stream value."""
    args, kwargs = side
    if isinstance(planned.stream, int):
        args = (*args[: planned.stream], z, *args[planned.stream + 1 :])
    else:
        kwargs = {**kwargs, planned.stream: z}
    output = block(*args, **kwargs)
    found: Tensor = output if planned.result is None else output[planned.result]
    return found


def by_position(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, -1).reshape(-1, values.shape[axis])


def _leaf(value: Any, leaves: list[Any]) -> Any:
    """A copy of a tensor of floats that is a leaf with a gradient, noted among the leaves; other values themselves."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    leaves.append(value.detach().requires_grad_())
    return leaves[-1]


class _Arrived(Exception):
    """Ends a forward pass at a block."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


@contextmanager
def _watched(model: nn.Module, paths: Iterable[str], look: Callable[..., None]) -> Iterator[None]:
    """Call `look(path, module, args, kwargs)` before each of these modules runs."""
    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(look, path), with_kwargs=True) for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
