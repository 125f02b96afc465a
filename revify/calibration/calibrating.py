"""Fitting the predictors: a converted model and images → one that stays nearer to the original, without training.

In z[k+1] = T(z[k]) + γ (z[k-1] − q(z[k])) the last term is what conversion does to a pretrained function. Walking a stage
block by block, q is fitted by ridge least squares to

    (T(z[k]) + γ z[k-1] − x*[k+1]) / γ,        x* the original network's own trajectory,

so that each step also repairs the drift of the steps before it. With a random sign of γ there is no drift to repair, and
the target is z[k-1] itself, on trajectories with such signs. A position counts by how much the model's output depends on
it, √|∂y/∂x*[k+1]|² on average over some images: a ViT's class token counts for more than one of its patches.
Along the depth only three stream values an image are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from revify.calibration.batches import Batch, Data, batches_of, main_output
from revify.calibration.choosing_bits import Trial, fewest_bits
from revify.calibration.forecasting import added_damage, fit_block, multiply_adds, with_form
from revify.calibration.walking import (
    Forecasts,
    Survey,
    Walk,
    drawing_signs,
    importance_of_batches,
    run_block,
    start_walks,
    survey_original,
)
from revify.errors import RefusalError, RevifyError
from revify.methods import Method
from revify.plans import Plan, StagePlan
from revify.rewriting.applying import apply_plan, remove_plan, share
from revify.runtime.grid import Grid
from revify.words import CALIBRATED, MAX_BITS, PredictorName

RIDGE = 0.3  # of the channels' variance; fine-tuning moves a stream by less, but where it varies little
TOLERANCE = (
    0.1  # relative change of the model's output that bits="auto" allows; .2 leaves a ResNet-56 .995 of its accuracy
)

SEEN = 2  # batches on which the deviation of the output is measured


Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of `calibrate`."""

    predictor: str
    bits: int | str | None
    rank: int | None
    tolerance: float
    ridge: float
    progress: Progress


def calibrate(
    model: nn.Module,
    data: Data,
    *,
    predictor: PredictorName = "auto",
    bits: int | Literal["auto"] | None = None,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    ridge: float = RIDGE,
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
        data: one batch of input [n, …] or a dictionary of keyword inputs, or an iterable of batches, such as a DataLoader;
            of a tuple the first element is taken. Batches may differ in size and shape. Of an output of several parts
            the first tensor of floats counts.
        predictor: "diagonal" (per channel, on z and T(z)), "lowrank", "linear_z" (C×C on z), "linear" (C×C on z and on
            T(z)), or "auto": the richest that costs at most a tenth of its block's multiply-adds.
        bits: residue bits for all blocks; "auto" for the fewest in each block that stay within the tolerance; None to
            keep those of the model's plan.
        rank: of "lowrank"; None for the largest whose cost is a tenth of the block's.
        tolerance: for bits="auto", the relative error of the model's output on the data.
        ridge: the least with which the part of the fit that mixes channels is pulled to nothing, ≥ 0, relative to the
            channels' variance. A low one suits the network as it is, a higher one what training makes of it.
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
    method = Method(predictor=predictor, bits=bits)
    plain = remove_plan(model)
    plan, forecasts = fit_plan(
        plain, plan, data, method, rank=rank, tolerance=tolerance, ridge=ridge, progress=progress
    )
    calibrated = apply_plan(plain, plan, forecasts=forecasts, trainable=trainable)
    for part, source in zip(calibrated.modules(), model.modules(), strict=True):
        part.training = source.training
    return calibrated


def fit_plan(
    model: nn.Module,
    plan: Plan,
    data: Data,
    method: Method,
    *,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    ridge: float = RIDGE,
    progress: Progress | None = None,
) -> tuple[Plan, Forecasts]:
    """Fit the predictors of a plan, and its bits where that is asked, to a plain model and images.

    Args:
        model: the plain model; it stays as it is.
        plan: of this model, with full streams and whole blocks.
        data: as for `calibrate`, like all that follow.
        method: gives the predictor and the bits.
        rank: as for `calibrate`.
        tolerance: as for `calibrate`.
        ridge: as for `calibrate`.
        progress: as for `calibrate`.

    Returns:
        The plan with the predictors, bits and deviation of each stage; what was fitted, by block path.
    """
    name = type(model).__name__
    if plan.is_split:
        raise RefusalError(
            f'{name}: the plan is one with streams="split", which has no predictors. Convert the plain model '
            'with streams="full", then calibrate it.'
        )
    if plan.is_cut:
        raise RefusalError(
            f'{name}: the plan is one with unit="branch", and predictors are fitted to whole blocks: convert '
            'the plain model with unit="block", then calibrate it.'
        )
    _check_options(method.predictor or "auto", tolerance, ridge)
    plain = share(model)
    batches = batches_of(plain, data)
    plan = replace(plan, stages=tuple(_fitted_sign(stage) for stage in plan.stages))
    request = Request(method.predictor or "auto", method.bits, rank, tolerance, ridge, progress or _silent)
    fitted: Forecasts = {}
    plain.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the random signs, if there are any
        importance = importance_of_batches(drawing_signs(apply_plan(plain, plan)), plan, batches)
        survey = survey_original(plain, plan, batches, importance)
        for number in range(len(plan.stages)):
            plan, forecasts = _settle_stage(plain, plan, number, fitted, batches, survey, request)
            fitted.update(forecasts)
    return plan, fitted


def deviation(outputs: Iterable[Any], wanted: Iterable[Any]) -> float:
    """|y − y*| / |y*| over all outputs; where one has several parts, the first tensor of floats counts."""
    difference = total = 0.0
    for y, y_wanted in zip(outputs, wanted, strict=True):
        y, y_wanted = main_output(y), main_output(y_wanted)
        difference += float((y - y_wanted).double().square().sum())
        total += float(y_wanted.double().square().sum())
    return (difference / max(total, 1e-30)) ** 0.5


def _settle_stage(
    plain: nn.Module,
    plan: Plan,
    number: int,
    fitted: Forecasts,
    batches: list[Batch],
    survey: Survey,
    request: Request,
) -> tuple[Plan, Forecasts]:
    """Calibrate one stage, at the bits that were asked for or at the fewest that are good enough."""
    allowed = request.tolerance * (number + 1) / len(plan.stages)
    stage = plan.stages[number]
    if isinstance(request.bits, int):
        stage = stage.with_bits(request.bits)
    start = start_walks(plain, _upto(plan, number), fitted, stage, batches, survey)

    def tried(damage: float | None) -> Trial:
        walks = [replace(walk) for walk in start]
        fit, forecasts, worst = _fit_stage(plain, stage, plan.grid_of(stage), request, walks, survey, damage)
        own = replace(plan, stages=(*plan.stages[:number], fit, *plan.stages[number + 1 :]))
        converted = apply_plan(plain, _upto(own, number + 1), forecasts={**fitted, **forecasts})
        partial_model, seen = drawing_signs(converted), batches[:SEEN]
        found = deviation((batch(partial_model) for batch in seen), survey.outputs[: len(seen)])
        request.progress(f"stage {number}: {fit.predictor}, {fit.bits_text} bits, deviation of the output {found:.4f}")
        return Trial(replace(fit, deviation=found), forecasts, worst)

    settled = tried(None) if request.bits != "auto" else fewest_bits(tried, allowed)
    return replace(plan, stages=(*plan.stages[:number], settled.stage, *plan.stages[number + 1 :])), settled.forecasts


def _fit_stage(
    plain: nn.Module,
    stage: StagePlan,
    grid: Grid,
    request: Request,
    walks: list[Walk],
    survey: Survey,
    damage: float | None,
) -> tuple[StagePlan, Forecasts, float]:
    """Walk the stage and fit each block's forecast; the walks end at the stage's output. Last the worst damage of a block.

    With `damage`, each block gets the fewest bits at which it adds no more than that to the relative deviation of the
    output, to first order: those that forecast badly, or matter much, get more (reverse water-filling).
    """
    if stage.axis is None:
        raise RefusalError(
            f"stage {stage.blocks[0].path} …: its channel axis could not be found, so no predictor can be fitted per channel. "
            'Use predictor="identity" or "midpoint" for this model.'
        )
    axis = stage.axis
    channels = walks[0].z.shape[axis]
    forecasts: Forecasts = {}
    worst = 0.0
    size = max(sum(float(y.double().square().sum()) for y in survey.outputs), 1e-30) ** 0.5
    for index, planned in enumerate(stage.blocks):
        block = plain.get_submodule(planned.path)
        if index == 1:
            cost = multiply_adds(block, planned, walks[0])
            stage = with_form(stage, request.predictor, request.rank, channels, cost)
        for walk in walks:
            z = walk.z.to(walk.original.dtype)
            walk.t = grid.round(run_block(block, planned, z, walk.sides[planned.path]))
            walk.aim = run_block(block, planned, walk.original, walk.sides[planned.path])
        following = [walk.t for walk in walks]
        if index > 0:
            own = stage.bits if planned.bits is None else planned.bits
            for bits in (own,) if damage is None else range(MAX_BITS + 1):
                forecasts[planned.path], following = fit_block(stage, planned.path, bits, walks, grid, request.ridge)
                if damage is None:
                    break
                added = added_damage(walks, following, planned.path) / size
                if added <= damage:
                    break
            if damage is not None:
                worst = max(worst, added)
                blocks = (*stage.blocks[:index], replace(planned, bits=bits), *stage.blocks[index + 1 :])
                stage = replace(stage, bits=0, blocks=blocks)
        for walk, z in zip(walks, following, strict=True):
            walk.older, walk.z, walk.original = walk.z, z, walk.aim
    return stage, forecasts, worst


def _fitted_sign(stage: StagePlan) -> StagePlan:
    """What is fitted repairs the change of the function itself, so that no signs need to balance it."""
    return replace(stage, sign="positive") if stage.sign == "balanced" else stage


def _upto(plan: Plan, number: int) -> Plan:
    return replace(plan, stages=plan.stages[:number], checkpointed=())


def _silent(_: str) -> None:
    return None


def _check_options(predictor: str, tolerance: float, ridge: float) -> None:
    if predictor not in ("auto", *CALIBRATED):
        raise RevifyError(f"predictor={predictor!r} cannot be calibrated: choose auto, {', '.join(CALIBRATED)}.")
    if not tolerance > 0:
        raise RevifyError(f"tolerance={tolerance!r}: give a relative error above 0, for example {TOLERANCE}.")
    if not 0 <= ridge < math.inf:
        raise RevifyError(f"ridge={ridge!r}: give a number from 0 upward, for example {RIDGE}.")
