"""One stage of a plan, fitted block by block, at the bits that were asked for or at the fewest that are good enough.

    walks ─cross─▶ what each batch meets at a block ─fit_block, or fit_within─▶ its forecast, z[k+1] ─follow─▶ walks

One copy of the model serves all trials of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from revify.calibration.batches import Batch, main_output
from revify.calibration.choosing_bits import Trial, fewest_bits
from revify.calibration.forecasting import Crossing, Fit, fit_block, fit_within, multiply_adds, with_form
from revify.calibration.walking import Forecasts, Survey, Walk, drawing_signs, run_block, start_walks
from revify.errors import RefusalError, RevifyError
from revify.methods import Method
from revify.plans import Plan
from revify.rewriting.applying import apply_plan, change_bits
from revify.rewriting.forecasts import set_forecast
from revify.runtime.grid import Grid
from revify.stage_plans import BlockPlan, StagePlan

MEASURED_BATCHES = 2  # on which the deviation of the model's output is measured

RIDGE = 0.3  # of the channels' variance; fine-tuning moves a stream by less, but where it varies little
TOLERANCE = (
    0.1  # relative change of the model's output that bits="auto" allows; .2 leaves a ResNet-56 .995 of its accuracy
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Fitting:
    """How predictors are to be fitted.

    Args:
        rank: of "lowrank"; None for the largest whose cost is a tenth of the block's.
        tolerance: for bits="auto", the relative error of the model's output on the data, > 0.
        ridge: the least with which the part of the fit that mixes channels is pulled to nothing, ≥ 0, relative to the
            channels' variance.
        progress: called with a line of text now and then.

    Raises:
        RevifyError: a value out of its range.
    """

    rank: int | None = None
    tolerance: float = TOLERANCE
    ridge: float = RIDGE
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise RevifyError(f"tolerance={self.tolerance!r}: give a relative error above 0, for example {TOLERANCE}.")
        if not 0 <= self.ridge < math.inf:
            raise RevifyError(f"ridge={self.ridge!r}: give a number from 0 upward, for example {RIDGE}.")

    def tell(self, text: str) -> None:
        """Say what goes on."""
        if self.progress is not None:
            self.progress(text)


@dataclass(frozen=True, slots=True)
class Scene:
    """What all stages are fitted to.

    Args:
        plain: the original network, in eval mode.
        batches: the images.
        survey: what the original does with them.
        method: gives the predictor and the bits.
        fitting: how they are fitted.
    """

    plain: nn.Module
    batches: list[Batch]
    survey: Survey
    method: Method
    fitting: Fitting


@dataclass(frozen=True, slots=True)
class Settled:
    """A plan after one more of its stages was fitted.

    Args:
        plan: with this stage as it was fitted.
        forecasts: of all stages up to this one, by block path.
        converted: the model with the stages up to this one converted.
    """

    plan: Plan
    forecasts: Forecasts
    converted: nn.Module


def settle_stage(scene: Scene, plan: Plan, number: int, before: Settled | None) -> Settled:
    """Fit one stage.

    Args:
        scene: what it is fitted to.
        plan: with the stages before this one as they were fitted.
        number: of the stage, from 0.
        before: what came of the stage before it.
    """
    stage = plan.stages[number]
    if isinstance(scene.method.bits, int):
        stage = stage.with_bits(scene.method.bits)
    fitted = before.forecasts if before else {}
    start = start_walks(before.converted if before else None, plan, stage, scene.batches, scene.survey)
    models: list[nn.Module] = []

    def done(trial: Trial) -> nn.Module:
        """The model with the stages up to this one converted: a copy the first time, then in place."""
        partial = replace(plan, stages=(*plan.stages[:number], trial.stage), checkpointed=())
        if not models:
            converted = apply_plan(scene.plain, partial, forecasts={**fitted, **_copies(trial.forecasts)})
            models.append(drawing_signs(converted))
        change_bits(models[0], partial)
        for path, tensors in trial.forecasts.items():
            set_forecast(models[0].get_submodule(path), tensors)
        return models[0]

    def tried(limit: float | None) -> Trial:
        trial = fit_stage(scene, stage, plan.grid_of(stage), start, limit)
        converted, seen = done(trial), scene.batches[:MEASURED_BATCHES]
        found = deviation((batch(converted) for batch in seen), scene.survey.outputs[: len(seen)])
        fit = replace(trial.stage, deviation=found)
        scene.fitting.tell(
            f"stage {number}: {fit.predictor}, {fit.bits_text} bits, deviation of the output {found:.4f}"
        )
        return replace(trial, stage=fit)

    if scene.method.bits != "auto":
        settled = tried(None)
    else:
        allowed = scene.fitting.tolerance * (number + 1) / len(plan.stages)
        settled = fewest_bits(tried, allowed)
        if settled.deviation > allowed:
            scene.fitting.tell(f"stage {number}: {settled.deviation:.4f} is kept, though {allowed:.4f} was asked for")
    stages = (*plan.stages[:number], settled.stage, *plan.stages[number + 1 :])
    return Settled(replace(plan, stages=stages), {**fitted, **settled.forecasts}, done(settled))


def fit_stage(scene: Scene, stage: StagePlan, grid: Grid, walks: list[Walk], limit: float | None) -> Trial:
    """Walk through a stage and fit each block's forecast.

    With a limit, each block gets the fewest bits at which it adds no more than that to the relative deviation of the
    output, to first order: those that forecast badly, or matter much, get more (reverse water-filling).
    """
    if stage.axis is None:
        raise RefusalError(
            f"stage {stage.blocks[0].path} …: its channel axis could not be found, so no predictor can be fitted per channel. "
            'Use predictor="identity" or "midpoint" for this model.'
        )
    size = max(sum(float(y.double().square().sum()) for y in scene.survey.outputs), 1e-30) ** 0.5
    first, second = (scene.plain.get_submodule(block.path) for block in stage.blocks[:2])
    crossings = cross(first, stage.blocks[0], walks, grid)
    walks = follow(walks, crossings, [crossing.t for crossing in crossings])
    cost = multiply_adds(second, stage.blocks[1], walks[0])
    stage = with_form(stage, scene.method.predictor or "auto", scene.fitting.rank, walks[0].z.shape[stage.axis], cost)
    fits: dict[str, Fit] = {}
    for planned in stage.blocks[1:]:
        crossings = cross(scene.plain.get_submodule(planned.path), planned, walks, grid)
        if limit is None:
            own = stage.bits if planned.bits is None else planned.bits
            fit = fit_block(stage, own, crossings, grid, scene.fitting.ridge)
        else:
            fit = fit_within(stage, limit * size, crossings, grid, scene.fitting.ridge)
        fits[planned.path] = fit
        walks = follow(walks, crossings, fit.following)
    if limit is not None:
        blocks = tuple(replace(b, bits=fits[b.path].bits) if b.path in fits else b for b in stage.blocks)
        stage = replace(stage, bits=0, blocks=blocks)
    worst = max((fit.damage for fit in fits.values()), default=0.0) / size
    return Trial(stage, {path: fit.tensors for path, fit in fits.items()}, worst)


def cross(block: nn.Module, planned: BlockPlan, walks: list[Walk], grid: Grid) -> list[Crossing]:
    """Run a block on what each batch brings to it, in the converted network and in the original."""
    crossings = []
    for walk in walks:
        side = walk.sides[planned.path]
        t = grid.round(run_block(block, planned, walk.z.to(walk.original.dtype), side))
        aim = run_block(block, planned, walk.original, side)
        crossings.append(Crossing(walk.older, walk.z, t, aim, walk.importance[planned.path]))
    return crossings


def follow(walks: list[Walk], crossings: list[Crossing], following: list[Tensor]) -> list[Walk]:
    """The walks after a block."""
    return [
        Walk(crossing.z, z, crossing.aim, walk.sides, walk.importance)
        for walk, crossing, z in zip(walks, crossings, following, strict=True)
    ]


def deviation(outputs: Iterable[Any], wanted: Iterable[Any]) -> float:  # Any: models return what they like
    """|y − y*| / |y*| over all outputs; where one has several parts, the first tensor of floats counts."""
    difference = total = 0.0
    for y, y_wanted in zip(outputs, wanted, strict=True):
        y, y_wanted = main_output(y), main_output(y_wanted)
        difference += float((y - y_wanted).double().square().sum())
        total += float(y_wanted.double().square().sum())
    return (difference / max(total, 1e-30)) ** 0.5


def _copies(forecasts: Forecasts) -> Forecasts:
    """Of their own for a model in which they will be changed in place."""
    return {path: {name: tensor.clone() for name, tensor in tensors.items()} for path, tensors in forecasts.items()}
