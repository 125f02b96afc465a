"""One block's forecast: which form the stage can afford, its tensors by least squares, and what it adds to the deviation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revify.calibration.least_squares import Sums, fit_dense, fit_diagonal, reduce_rank, subtract, take
from revify.calibration.walking import Importance, Walk, by_position, run_block
from revify.rewriting.forecasts import hold_forecast
from revify.runtime.grid import Grid, random_signs, step
from revify.runtime.predictors import make_predictor
from revify.stage_plans import BlockPlan, StagePlan
from revify.words import MAX_BITS

COST = 0.10  # of a block's multiply-adds that "auto" may spend on its predictor


@dataclass(frozen=True, slots=True)
class Crossing:
    """What one batch meets at a block.

    Args:
        older: z[k-1].
        z: z[k].
        t: T(z[k]), on the grid.
        aim: x*[k+1], where the original network goes.
        importance: of the block's output.
    """

    older: Tensor
    z: Tensor
    t: Tensor
    aim: Tensor
    importance: Importance


@dataclass(frozen=True, slots=True)
class Fit:
    """One block's forecast, fitted.

    Args:
        bits: residue bits at which it was fitted.
        tensors: of the forecast, by name.
        following: z[k+1] of each batch.
        damage: what the step adds to the error of the model's output, to first order.
    """

    bits: int
    tensors: dict[str, Tensor]
    following: list[Tensor]
    damage: float


def with_form(stage: StagePlan, predictor: str, rank: int | None, channels: int, cost: float) -> StagePlan:
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


def multiply_adds(block: nn.Module, planned: BlockPlan, walk: Walk) -> float:
    """What the block costs per element of its stream."""
    with FlopCounterMode(display=False) as counter:
        run_block(block, planned, walk.original, walk.sides[planned.path])
    return counter.get_total_flops() / 2 / walk.z.numel()


def fit_block(stage: StagePlan, bits: int, crossings: list[Crossing], grid: Grid, ridge: float) -> Fit:
    """Fit one block's forecast at these bits."""
    assert stage.axis is not None  # the caller asked
    axis, gamma = stage.axis, 2.0**-bits
    channels = crossings[0].z.shape[axis]
    sums = [Sums.empty(2 * channels, channels) for _ in range(2)]
    images = 0
    for at in crossings:
        wanted = at.older if stage.sign == "random" else at.older + (at.t - at.aim) / gamma
        goal = wanted - at.z
        for half, part in enumerate(sums):
            rows = slice((half + images) % 2, None, 2)
            x = torch.cat([by_position(at.z[rows], axis), by_position(at.t[rows], axis)], dim=1)
            part.add(x, by_position(goal[rows], axis), at.importance.of(len(x)))
        images += len(at.z)
    tensors = _forecast(sums, stage, channels, crossings[0].z.device, ridge)
    holder = nn.Module()
    hold_forecast(holder, tensors)
    forecast = make_predictor(stage.predictor, holder, axis, grid)
    following: list[Tensor] = []
    for at in crossings:
        gap, late = at.older - forecast.before(at.z), forecast.after(at.t)
        sign = random_signs(at.z) if stage.sign == "random" else None
        following.append(step(at.t, gap if late is None else gap - late, bits, grid, sign)[0])
    return Fit(bits, tensors, following, _damage(crossings, following))


def fit_within(stage: StagePlan, limit: float, crossings: list[Crossing], grid: Grid, ridge: float) -> Fit:
    """Fit one block's forecast at the fewest bits at which the block does no more damage than the limit."""
    for bits in range(MAX_BITS + 1):
        fit = fit_block(stage, bits, crossings, grid, ridge)
        if fit.damage <= limit:
            break
    return fit


def _damage(crossings: list[Crossing], following: list[Tensor]) -> float:
    """What a step adds to the error of the output that the steps before it made, to first order."""
    left = came = energy = 0.0
    for at, z in zip(crossings, following, strict=True):
        left += float((z - at.aim).double().square().sum())
        came += float((at.t - at.aim).double().square().sum())
        energy += at.importance.energy / len(crossings)
    return energy**0.5 * (left**0.5 - came**0.5)


def _forecast(
    sums: list[Sums], stage: StagePlan, channels: int, device: torch.device, ridge: float
) -> dict[str, Tensor]:
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
        dense = fit_dense(rest[0], rest[1], ridge)
        shift = dense.shift
        if stage.predictor == "lowrank":
            tensors["up"], tensors["down"], shift = reduce_rank(dense, rest[0] + rest[1], stage.rank)
        else:
            tensors["weight"] = dense.weight[:channels].T
        if stage.predictor == "linear":
            tensors["weight_t"] = dense.weight[channels:].T
        tensors["shift"] = tensors["shift"] + shift
    return {name: tensor.to(device, torch.float32).contiguous() for name, tensor in tensors.items()}
