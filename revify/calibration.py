"""Fitting the predictors: a converted model and images → one that stays nearer to the original, without training.

In z[k+1] = T(z[k]) + γ (z[k-1] − q(z[k])) the last term is what conversion does to a pretrained function. Walking a stage
block by block, q is fitted by ridge least squares to

    (T(z[k]) + γ z[k-1] − x*[k+1]) / γ,        x* the original network's own trajectory,

so that each step also repairs the drift of the steps before it. A position counts by how much the model's output depends on
it, √|∂y/∂x*[k+1]|² on average over some images: a ViT's class token counts for more than one of its patches. Along the depth only three stream values an image are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revify.errors import RefusalError, RevifyError
from revify.fitting import Sums, fit_dense, fit_diagonal, reduce_rank, subtract, take
from revify.planning import BlockPlan, Plan, StagePlan
from revify.predictors import CALIBRATED, hold_forecast, make_predictor
from revify.rewriting import apply_plan, remove_plan
from revify.stream import MAX_BITS, Grid, step

CHUNK = 32  # images that run at a time where one large batch is given
COST = 0.10  # of a block's multiply-adds that "auto" may spend on its predictor
TOLERANCE = 0.05  # relative change of the model's output that bits="auto" allows

LOOK = 8  # images on which it is found what the output depends on
FLOOR = 0.1  # what a position counts at least, where the average counts 1
SEEN = 2  # batches on which the deviation of the output is measured

Progress = Callable[[str], None]
Side = tuple[tuple[Any, ...], dict[str, Any]]  # Any: side inputs are of every type
Forecasts = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of `calibrate`."""

    predictor: str
    bits: int | str | None
    rank: int | None
    tolerance: float
    progress: Progress


@dataclass(frozen=True, slots=True)
class Survey:
    """What the original does with each batch.

    Args:
        outputs: what it returns.
        arrived: what enters each stage, by the path of its first block.
        sides: the arguments of each block besides the stream, by path.
        importance: how much each position of each block's output counts, by path, flat, 1 on average.
    """

    outputs: list[Any]  # Any: models return what they like
    arrived: list[dict[str, Tensor]]
    sides: list[dict[str, Side]]
    importance: dict[str, Tensor]


@dataclass(slots=True)
class Walk:
    """Where one batch of calibration images stands in a stage.

    Args:
        older: z[k-1].
        z: z[k].
        original: x*[k].
        sides: for each block by path, the arguments besides the stream.
        t: T(z[k]), while block k is being fitted.
        aim: x*[k+1], while block k is being fitted.
    """

    older: Tensor
    z: Tensor
    original: Tensor
    sides: dict[str, Side]
    t: Tensor | None = None
    aim: Tensor | None = None


def calibrate(
    model: nn.Module,
    data: Tensor | Iterable[Any],
    *,
    predictor: str = "auto",
    bits: int | str | None = None,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    trainable: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Fit the predictors of a converted model, so that it computes nearly what the original computed.

    Nothing is trained; a few dozen images are enough, labels are not needed. Call it again to change the bits or to refit
    after training. The given model stays as it is, parameters are shared.

    Example:
        >>> import timm, torch, revify
        >>> model = revify.convert(timm.create_model("test_vit"), bits=1)
        >>> model = revify.calibrate(model, torch.randn(4, 3, 160, 160), predictor="diagonal")

    Args:
        model: a converted model.
        data: one batch of input [n, …], or an iterable of batches; of a tuple the first element is taken.
        predictor: "diagonal" (per channel, on z and T(z)), "lowrank", "linear_z" (C×C on z), "linear" (C×C on z and on
            T(z)), or "auto": the richest that costs at most a tenth of its block's multiply-adds.
        bits: residue bits for all stages; "auto" for the fewest per stage that stay within the tolerance; None to keep
            those of the model's plan.
        rank: of "lowrank"; None for the largest whose cost is a tenth of the block's.
        tolerance: for bits="auto", the relative error of the model's output on the data.
        trainable: hold what was fitted as parameters instead of buffers.
        progress: called with a line of text now and then.

    Returns:
        A converted model with calibrated predictors, sharing the parameters. The plan says bits and deviation per stage.

    Raises:
        RefusalError: the model is not a converted one, or the channel axis of a stage could not be found.
        RevifyError: an option is out of its range, or there are no data.
    """
    plan = getattr(model, "revify_plan", None)
    if not isinstance(plan, Plan):
        raise RefusalError(f"{type(model).__name__} is not a converted model: convert it, then calibrate it.")
    _check_options(predictor, bits, tolerance)
    plain = remove_plan(model)
    batches = _batches(plain, data)
    request = Request(predictor, bits, rank, tolerance, progress or _silent)
    fitted: Forecasts = {}
    with _in_eval_mode(plain), torch.no_grad():
        importance = _importance(apply_plan(plain, plan), plan, batches[0][:LOOK])
        survey = _survey(plain, plan, batches, importance)
        for number in range(len(plan.stages)):
            plan, forecasts = _settle_stage(plain, plan, number, fitted, batches, survey, request)
            fitted.update(forecasts)
        calibrated = apply_plan(plain, plan, forecasts=fitted, trainable=trainable)
    for part, source in zip(calibrated.modules(), model.modules(), strict=True):
        part.training = source.training
    return calibrated


def deviation(outputs: Iterable[Any], wanted: Iterable[Any]) -> float:
    """|y − y*| / |y*| over all outputs; of a tuple or list the first element counts."""
    difference = total = 0.0
    for y, y_wanted in zip(outputs, wanted, strict=True):
        y, y_wanted = _first(y), _first(y_wanted)
        difference += float((y - y_wanted).double().square().sum())
        total += float(y_wanted.double().square().sum())
    return (difference / max(total, 1e-30)) ** 0.5


def _settle_stage(
    plain: nn.Module,
    plan: Plan,
    number: int,
    fitted: Forecasts,
    batches: list[Tensor],
    survey: Survey,
    request: Request,
) -> tuple[Plan, Forecasts]:
    """Calibrate one stage, at the bits that were asked for or at the fewest that are good enough."""
    allowed = request.tolerance * (number + 1) / len(plan.stages)
    stage = plan.stages[number]
    asked = stage.bits if request.bits is None else request.bits
    start = _walks(plain, _upto(plan, number), fitted, stage, batches, survey)
    for bits in range(MAX_BITS + 1) if request.bits == "auto" else (int(asked),):
        trial, forecasts = _fit_stage(plain, replace(stage, bits=bits), plan.grid, request, [replace(w) for w in start], survey.importance)
        trial_plan = replace(plan, stages=(*plan.stages[:number], trial, *plan.stages[number + 1 :]))
        partial_model = apply_plan(plain, _upto(trial_plan, number + 1), forecasts={**fitted, **forecasts})
        seen = batches[:SEEN]
        found = deviation((partial_model(x) for x in seen), survey.outputs[: len(seen)])
        request.progress(f"stage {number}: {trial.predictor}, {bits} bits, deviation of the output {found:.4f}")
        if found <= allowed:
            break
    settled = replace(trial, deviation=found)
    return replace(plan, stages=(*plan.stages[:number], settled, *plan.stages[number + 1 :])), forecasts


def _fit_stage(
    plain: nn.Module, stage: StagePlan, resolution: int, request: Request, walks: list[Walk], importance: dict[str, Tensor]
) -> tuple[StagePlan, Forecasts]:
    """Walk the stage and fit each block's forecast; the walks end at the stage's output."""
    if stage.axis is None:
        raise RefusalError(
            f"stage {stage.blocks[0].path} …: its channel axis could not be found, so no predictor can be fitted per channel. "
            'Use predictor="identity" or "midpoint" for this model.'
        )
    grid, gamma, axis = Grid(resolution), 2.0**-stage.bits, stage.axis
    channels = walks[0].z.shape[axis]
    forecasts: Forecasts = {}
    for index, planned in enumerate(stage.blocks):
        block = plain.get_submodule(planned.path)
        if index == 1:
            cost = _multiply_adds(block, planned, walks[0])
            stage = _with_form(stage, request.predictor, request.rank, channels, cost)
        sums = [Sums.empty(2 * channels, channels) for _ in range(2)]
        images = 0
        for walk in walks:
            walk.t = grid.round(_run(block, planned.stream, walk.z, walk.sides[planned.path]))
            walk.aim = _run(block, planned.stream, walk.original, walk.sides[planned.path])
            if index > 0:
                goal = (walk.t + gamma * walk.older - walk.aim) / gamma - walk.z
                weight = importance[planned.path]
                for half, part in enumerate(sums):
                    rows = slice((half + images) % 2, None, 2)
                    x = torch.cat([_flat(walk.z[rows], axis), _flat(walk.t[rows], axis)], dim=1)
                    part.add(x, _flat(goal[rows], axis), weight.repeat(len(x) // len(weight)))
            images += len(walk.z)
        if index > 0:
            tensors = _forecast(sums, stage, channels, walks[0].z.device)
            forecasts[planned.path] = tensors
        for walk in walks:
            assert walk.t is not None and walk.aim is not None  # set above
            following = walk.t
            if index > 0:
                holder = nn.Module()
                hold_forecast(holder, tensors)
                forecast = make_predictor(stage.predictor, holder, axis, grid)
                gap = walk.older - forecast.before(walk.z)
                late = forecast.after(walk.t)
                following, _ = step(walk.t, gap if late is None else gap - late, stage.bits, grid)
            walk.older, walk.z, walk.original = walk.z, following, walk.aim
    return stage, forecasts


def _forecast(sums: list[Sums], stage: StagePlan, channels: int, device: torch.device) -> dict[str, Tensor]:
    """The tensors of one block's forecast, q − z being fitted to features [z, T(z)] of two halves of the images."""
    diagonal = fit_diagonal(*sums)
    pick = torch.arange(channels)
    tensors = {
        "scale": 1 + diagonal.weight[pick, pick],
        "scale_t": diagonal.weight[pick + channels, pick],
        "shift": diagonal.shift,
    }
    if stage.predictor != "diagonal":
        features = slice(None) if stage.predictor == "linear" else slice(0, channels)
        rest = [take(subtract(part, diagonal), features) for part in sums]
        dense = fit_dense(*rest)
        shift = dense.shift
        if stage.predictor == "lowrank":
            tensors["up"], tensors["down"], shift = reduce_rank(dense, rest[0] + rest[1], stage.rank)
        else:
            tensors["weight"] = dense.weight[:channels].T
        if stage.predictor == "linear":
            tensors["weight_t"] = dense.weight[channels:].T
        tensors["shift"] = tensors["shift"] + shift
    return {name: tensor.to(device, torch.float32).contiguous() for name, tensor in tensors.items()}


def _with_form(stage: StagePlan, predictor: str, rank: int | None, channels: int, cost: float) -> StagePlan:
    """Which predictor the stage gets, given the multiply-adds of its block per element (linear: C, rank r: 2r)."""
    affordable = int(COST * cost / 2)
    if predictor == "auto":
        for richest, price in (("linear", 2 * channels), ("linear_z", channels)):
            if price <= COST * cost:
                return replace(stage, predictor=richest, rank=0)
        predictor = "lowrank" if affordable >= 1 else "diagonal"
    if predictor == "lowrank":
        chosen = rank if rank is not None else max(affordable, 1)
        return replace(stage, predictor="lowrank", rank=min(chosen, channels))
    return replace(stage, predictor=predictor, rank=0)


def _multiply_adds(block: nn.Module, planned: BlockPlan, walk: Walk) -> float:
    """What the block costs per element of its stream."""
    with FlopCounterMode(display=False) as counter:
        _run(block, planned.stream, walk.z, walk.sides[planned.path])
    return counter.get_total_flops() / 2 / walk.z.numel()


def _importance(converted: nn.Module, plan: Plan, x: Tensor) -> dict[str, Tensor]:
    """How much the output depends on each position of each block's output, through the memory-free backward."""
    planned = {block.path: stage for stage in plan.stages for block in stage.blocks}
    grads: dict[str, Tensor] = {}

    def remember(path: str, _: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(grads.__setitem__, path))  # type: ignore[no-untyped-call]

    handles = [converted.get_submodule(path).register_forward_hook(partial(remember, path)) for path in planned]
    try:
        with torch.enable_grad():
            y = _first(converted(x))
            signs = torch.randint(0, 2, y.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
            leaves: list[Tensor] = [p for p in converted.parameters() if p.requires_grad]
            torch.autograd.grad((y * signs.to(y)).sum(), leaves, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, stage in planned.items():
        size = 1
        for axis, length in enumerate(stage.shape):
            size *= 1 if axis in (0, stage.axis) else length
        found[path] = torch.ones(size)
        if path in grads and stage.axis is not None:
            energy = _flat(grads[path].square(), stage.axis).sum(1).view(len(x), -1).mean(0).double()
            found[path] = (energy / energy.mean().clamp_min(1e-30)).sqrt().clamp_min(FLOOR).cpu()
    return found


def _survey(plain: nn.Module, plan: Plan, batches: list[Tensor], importance: dict[str, Tensor]) -> Survey:
    """One pass of the original over the data: its outputs, what enters each stage, and the blocks' other arguments."""
    paths = [planned.path for stage in plan.stages for planned in stage.blocks]
    entrances = {stage.blocks[0].path for stage in plan.stages}
    streams = {planned.path: planned.stream for stage in plan.stages for planned in stage.blocks}
    survey = Survey([], [], [], importance)
    for x in batches:
        arrived: dict[str, Tensor] = {}
        sides: dict[str, Side] = {}

        def look(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            at = streams[path]
            if path in entrances:  # noqa: B023  (called within this round of the loop)
                arrived[path] = args[at] if isinstance(at, int) else kwargs[at]  # noqa: B023
            holed = tuple(None if at == i else a for i, a in enumerate(args))
            sides[path] = (holed, {name: None if at == name else a for name, a in kwargs.items()})  # noqa: B023

        with _watched(plain, paths, look):
            survey.outputs.append(plain(x))
        survey.arrived.append(arrived)
        survey.sides.append(sides)
    return survey


def _walks(
    plain: nn.Module, upstream: Plan, fitted: Forecasts, stage: StagePlan, batches: list[Tensor], survey: Survey
) -> list[Walk]:
    """Every batch at the entrance of a stage, in the converted model so far and in the original."""
    converted = apply_plan(plain, upstream, forecasts=fitted) if upstream.stages else None
    grid, first = Grid(upstream.grid), stage.blocks[0]
    walks = []
    for x, arrived, sides in zip(batches, survey.arrived, survey.sides, strict=True):
        original = arrived[first.path]
        z = grid.round(original if converted is None else _arriving(converted, first, x))
        walks.append(Walk(z, z, original, sides))
    return walks


def _arriving(model: nn.Module, block: BlockPlan, x: Tensor) -> Tensor:
    """What comes to a block; the rest of the model does not run."""

    def stop(_: str, __: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Arrived(args[block.stream] if isinstance(block.stream, int) else kwargs[block.stream])

    with _watched(model, [block.path], stop):
        try:
            model(x)
        except _Arrived as arrived:
            return arrived.value
    raise RefusalError(f"{block.path} was not called on the calibration data, though it was on the plan's example.")


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


def _run(block: nn.Module, stream: int | str, z: Tensor, side: Side) -> Tensor:
    args, kwargs = side
    if isinstance(stream, int):
        args = (*args[:stream], z, *args[stream + 1 :])
    else:
        kwargs = {**kwargs, stream: z}
    output: Tensor = block(*args, **kwargs)
    return output


def _upto(plan: Plan, number: int) -> Plan:
    return replace(plan, stages=plan.stages[:number], checkpointed=())


def _flat(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, -1).reshape(-1, values.shape[axis])


def _batches(model: nn.Module, data: Tensor | Iterable[Any]) -> list[Tensor]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[Tensor] = []
    for batch in [data] if isinstance(data, Tensor) else data:
        x = _first(batch)
        if not isinstance(x, Tensor):
            raise RevifyError(f"calibration data: expected batches of tensors, got {type(x).__name__}.")
        found += [x[start : start + CHUNK].to(device) for start in range(0, len(x), CHUNK)]
    if not found:
        raise RevifyError("calibration data: there is no batch in them. Give at least one, some 32 to 256 images.")
    return found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) else value


class _in_eval_mode:
    """Run the body with a model in eval mode, and put every module's mode back."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        for module, _ in self._modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training


def _silent(_: str) -> None:
    return None


def _check_options(predictor: str, bits: int | str | None, tolerance: float) -> None:
    if predictor not in ("auto", *CALIBRATED):
        raise RevifyError(f"predictor={predictor!r} cannot be calibrated: choose auto, {', '.join(CALIBRATED)}.")
    in_range = isinstance(bits, int) and not isinstance(bits, bool) and 0 <= bits <= MAX_BITS
    if not (bits is None or bits == "auto" or in_range):
        raise RevifyError(f'bits={bits!r}: give a whole number from 0 to {MAX_BITS}, or "auto".')
    if not tolerance > 0:
        raise RevifyError(f"tolerance={tolerance!r}: give a relative error above 0, for example {TOLERANCE}.")


