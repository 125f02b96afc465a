"""bits="auto": the fewest bits of each block at which a stage keeps the model's output to the tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from revify.calibration.walking import Forecasts
from revify.stage_plans import StagePlan

TRIALS = 12  # bits="auto": how often what one block may add to the deviation of the output is lowered
REFINED = 2  # and how often it is then raised, or lowered, half the way back to what was too much


@dataclass(frozen=True, slots=True)
class Trial:
    """A stage as it was fitted once.

    Args:
        stage: with its deviation.
        forecasts: of its blocks.
        worst: the most that one of its blocks adds to the deviation of the output, to first order.
    """

    stage: StagePlan
    forecasts: Forecasts
    worst: float

    @property
    def deviation(self) -> float:
        return self.stage.deviation or 0.0


def fewest_bits(tried: Callable[[float | None], Trial], allowed: float) -> Trial:
    """The trial with the largest damage per block at which the stage stays within what is allowed."""
    trial = best = tried(math.inf)
    too_much, damage = math.inf, math.inf
    for _ in range(TRIALS):
        if trial.deviation <= allowed or trial.worst <= 0:  # where no block adds anything, more bits mend nothing
            break
        too_much = min(damage, trial.worst)
        damage = too_much / 2
        trial = best = tried(damage)
    for _ in range(REFINED if math.isfinite(too_much) else 0):
        between = math.sqrt(damage * too_much)
        trial = tried(between)
        if trial.deviation <= allowed:
            best, damage = trial, between
        else:
            too_much = between
    return best
