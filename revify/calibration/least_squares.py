"""Ridge least squares from sums: features and targets come batch by batch, only float64 normal equations are kept.

Everything is centred and scaled per feature; the ridge pulls to nothing, so what is fitted is best a correction: with fewer
positions than channels there is then little of it. How strongly it pulls is chosen on images that were left out of the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNCHECKED_RIDGE = 1e-2  # where a single image leaves nothing to choose it on
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # relative to the features' variance


@dataclass(slots=True)
class Sums:
    """Normal equations of targets y [n, C] on features x [n, F], as sums over weighted positions, in float64.

    Args:
        gram: Σ x xᵀ [F, F].
        cross: Σ x yᵀ [F, C].
        square: Σ y² [C].
        mean_x: Σ x [F].
        mean_y: Σ y [C].
        count: the sum of the weights.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    mean_x: Tensor
    mean_y: Tensor
    count: float = 0.0

    @classmethod
    def empty(cls, features: int, targets: int) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(zeros(features, features), zeros(features, targets), zeros(targets), zeros(features), zeros(targets))

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Take in positions x [n, F] with targets y [n, C], counting each `weight` [n] times."""
        x, y, weight = x.double().cpu(), y.double().cpu(), weight.double().cpu()
        weighted = x * weight[:, None]
        self.gram.addmm_(weighted.T, x)
        self.cross.addmm_(weighted.T, y)
        self.square += weight @ (y * y)
        self.mean_x += weighted.sum(0)
        self.mean_y += weight @ y
        self.count += float(weight.sum())

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.mean_x + other.mean_x,
            self.mean_y + other.mean_y,
            self.count + other.count,
        )

    def error(self, weight: Tensor, shift: Tensor) -> float:
        """Σ |y − x·weight − shift|² over the positions that were taken in, per position."""
        total = self.square.sum() - 2 * (weight * self.cross).sum() + (weight * (self.gram @ weight)).sum()
        total += self.count * (shift @ shift) + 2 * shift @ (self.mean_x @ weight - self.mean_y)
        return float(total) / max(self.count, 1.0)


@dataclass(frozen=True, slots=True)
class Fit:
    """y ≈ x·weight + shift, weight [F, C] float64, with the ridge that was used."""

    weight: Tensor
    shift: Tensor
    ridge: float = 0.0


def fit_dense(train: Sums, held_out: Sums, least: float = 0.0) -> Fit:
    """Every target from every feature.

    The ridge is the best on the left-out positions, but no less than `least`; then all positions are used.
    """
    return _fit(_solve, train, held_out, least)


def fit_diagonal(train: Sums, held_out: Sums) -> Fit:
    """Target c from features c, c+C, …: as many features for each of the C channels as there are groups of C features."""
    return _fit(_solve_diagonal, train, held_out)


def _fit(solve: Callable[[Sums, float], Fit], train: Sums, held_out: Sums, least: float = 0.0) -> Fit:
    if held_out.count == 0:
        return solve(train, max(UNCHECKED_RIDGE, least))
    ridges = sorted({max(ridge, least) for ridge in RIDGES})
    fits = [solve(train, ridge) for ridge in ridges]
    errors = [held_out.error(fit.weight, fit.shift) for fit in fits]
    return solve(train + held_out, ridges[errors.index(min(errors))])


def reduce_rank(fit: Fit, sums: Sums, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best map of the given rank, as (up [C, r], down [r, F], shift [C]): reduced-rank regression.

    Reference:
        Izenman 1975, "Reduced-rank regression for the multivariate linear model": the fitted values are projected on
        their leading principal directions.
    """
    gram, _ = _centred(sums)
    _, directions = torch.linalg.eigh(fit.weight.T @ gram @ fit.weight)
    up = directions[:, -rank:]
    down = (fit.weight @ up).T
    shift = (sums.mean_y - sums.mean_x @ down.T @ up.T) / sums.count
    return up, down, shift


def subtract(sums: Sums, fit: Fit) -> Sums:
    """The normal equations of what the fit leaves: targets y − x·weight − shift on the same features."""
    weight, shift = fit.weight, fit.shift
    cross = sums.cross - sums.gram @ weight - torch.outer(sums.mean_x, shift)
    mean_y = sums.mean_y - sums.mean_x @ weight - sums.count * shift
    square = sums.square - 2 * (weight * sums.cross).sum(0) + (weight * (sums.gram @ weight)).sum(0)
    square += sums.count * shift**2 + 2 * shift * (sums.mean_x @ weight - sums.mean_y)
    return Sums(sums.gram, cross, square, sums.mean_x, mean_y, sums.count)


def take(sums: Sums, features: Sequence[int] | slice) -> Sums:
    """The normal equations on some of the features."""
    return Sums(
        sums.gram[features][:, features],
        sums.cross[features],
        sums.square,
        sums.mean_x[features],
        sums.mean_y,
        sums.count,
    )


def _centred(sums: Sums) -> tuple[Tensor, Tensor]:
    count = max(sums.count, 1)
    gram = sums.gram - torch.outer(sums.mean_x, sums.mean_x) / count
    cross = sums.cross - torch.outer(sums.mean_x, sums.mean_y) / count
    return gram, cross


def _solve(sums: Sums, ridge: float) -> Fit:
    gram, cross, scale = _standardised(sums)
    gram = gram + ridge * torch.eye(len(scale), dtype=torch.float64)
    weight = torch.linalg.solve(gram, cross) / scale[:, None]
    return Fit(weight, (sums.mean_y - sums.mean_x @ weight) / max(sums.count, 1.0), ridge)


def _solve_diagonal(sums: Sums, ridge: float) -> Fit:
    channels = len(sums.mean_y)
    groups = len(sums.mean_x) // channels
    gram, cross, scale = _standardised(sums)
    own = torch.arange(groups)[:, None] * channels + torch.arange(channels)  # [group, channel] → feature
    small = gram[own.T[:, :, None], own.T[:, None, :]] + ridge * torch.eye(groups, dtype=torch.float64)
    solved = torch.linalg.solve(small, cross[own.T, torch.arange(channels)[:, None]]) / scale[own.T]
    weight = torch.zeros_like(sums.cross)
    weight[own.T, torch.arange(channels)[:, None]] = solved
    return Fit(weight, (sums.mean_y - sums.mean_x @ weight) / max(sums.count, 1.0), ridge)


def _standardised(sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Covariances of features scaled to variance 1 with each other and with the targets, and those scales."""
    gram, cross = _centred(sums)
    count = max(sums.count, 1.0)
    scale = (torch.diagonal(gram) / count).clamp_min(1e-12).sqrt()
    return gram / torch.outer(scale, scale) / count, cross / scale[:, None] / count, scale
