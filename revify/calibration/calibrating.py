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

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from revify.calibration.batches import Data, batches_of
from revify.calibration.settling import RIDGE, TOLERANCE, Fitting, Progress, Scene, Settled, settle_stage
from revify.calibration.walking import (
    Forecasts,
    drawing_signs,
    importance_of_batches,
    survey_original,
)
from revify.errors import RefusalError, RevifyError
from revify.methods import DEFAULT_BITS, Method
from revify.plans import Plan
from revify.rewriting.applying import apply_plan, remove_plan, share
from revify.stage_plans import StagePlan
from revify.words import CALIBRATED, PredictorName


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
        model: a converted model; coded steps become a recurrence, which alone has predictors.
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
    plan, forecasts = fit_plan(plain, plan, data, method, Fitting(rank, tolerance, ridge, progress))
    calibrated = apply_plan(plain, plan, forecasts=forecasts, trainable=trainable)
    for part, source in zip(calibrated.modules(), model.modules(), strict=True):
        part.training = source.training
    return calibrated


def fit_plan(
    model: nn.Module,
    plan: Plan,
    data: Data,
    method: Method,
    fitting: Fitting,
) -> tuple[Plan, Forecasts]:
    """Fit the predictors of a plan, and its bits where that is asked, to a plain model and images.

    Args:
        model: the plain model; it stays as it is.
        plan: of this model, with full streams and whole blocks.
        data: as for `calibrate`.
        method: gives the predictor and the bits.
        fitting: how they are fitted.

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
    if method.predictor not in (None, "auto", *CALIBRATED):
        choices = ", ".join(CALIBRATED)
        raise RevifyError(f"predictor={method.predictor!r} cannot be calibrated: choose auto, {choices}.")
    plain = share(model)
    batches = batches_of(plain, data)
    plan = replace(plan, stages=tuple(_to_be_fitted(stage) for stage in plan.stages))
    plain.eval()
    settled: Settled | None = None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the random signs, if there are any
        importance = importance_of_batches(drawing_signs(apply_plan(plain, plan)), plan, batches)
        scene = Scene(plain, batches, survey_original(plain, plan, batches, importance), method, fitting)
        for number in range(len(plan.stages)):
            settled = settle_stage(scene, plan, number, settled)
            plan = settled.plan
    return plan, settled.forecasts if settled else {}


def _to_be_fitted(stage: StagePlan) -> StagePlan:
    """A stage as one that is fitted starts: a recurrence, since coded steps have no predictor, and with no signs that
    balance it, since what is fitted repairs the change of the function itself."""
    if stage.step == "coded":
        stage = replace(stage.with_bits(DEFAULT_BITS["recurrence"]), step="recurrence", predictor="identity")
    return replace(stage, sign="positive") if stage.sign == "balanced" else stage
