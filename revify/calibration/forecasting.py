"""One block's forecast: which form the stage can afford, its tensors by least squares, and what it adds to the deviation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revify.calibration.least_squares import Sums, fit_dense, fit_diagonal, reduce_rank, subtract, take
from revify.calibration.walking import Walk, by_position, run_block
from revify.plans import BlockPlan, StagePlan
from revify.rewriting.forecasts import hold_forecast
from revify.runtime.grid import Grid, random_signs, step
from revify.runtime.predictors import make_predictor

COST = 0.10  # of a block's multiply-adds that "auto" may spend on its predictor


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


def fit_block(
    stage: StagePlan, path: str, bits: int, walks: list[Walk], grid: Grid, ridge: float
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The tensors of one block's forecast at these bits, and the stream values that follow."""
    assert stage.axis is not None  # the caller asked
    axis, gamma = stage.axis, 2.0**-bits
    channels = walks[0].z.shape[axis]
    sums = [Sums.empty(2 * channels, channels) for _ in range(2)]
    images = 0
    for walk in walks:
        wanted = walk.older if stage.sign == "random" else walk.older + (walk.t - walk.aim) / gamma
        goal = wanted - walk.z
        for half, part in enumerate(sums):
            rows = slice((half + images) % 2, None, 2)
            x = torch.cat([by_position(walk.z[rows], axis), by_position(walk.t[rows], axis)], dim=1)
            part.add(x, by_position(goal[rows], axis), walk.importance[path].of(len(x)))
        images += len(walk.z)
    tensors = _forecast(sums, stage, channels, walks[0].z.device, ridge)
    holder = nn.Module()
    hold_forecast(holder, tensors)
    forecast = make_predictor(stage.predictor, holder, axis, grid)
    following: list[Tensor] = []
    for walk in walks:
        gap, late = walk.older - forecast.before(walk.z), forecast.after(walk.t)
        sign = random_signs(walk.z) if stage.sign == "random" else None
        following.append(step(walk.t, gap if late is None else gap - late, bits, grid, sign)[0])
    return tensors, following


def added_damage(walks: list[Walk], following: list[Tensor], path: str) -> float:
    """The deviation of the output that a step adds to what the steps before it did, to first order."""
    left = came = energy = 0.0
    for walk, z in zip(walks, following, strict=True):
        left += float((z - walk.aim).double().square().sum())
        came += float((walk.t - walk.aim).double().square().sum())
        energy += walk.importance[path].energy / len(walks)
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
