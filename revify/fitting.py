"""Ridge least squares from sums: features and targets come batch by batch, only float64 normal equations are kept.

Everything is centred and scaled per feature, and the forecast q = z is where the ridge pulls to: with fewer positions
than channels the fit stays near it. How strongly it pulls is chosen on images that were left out of the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # relative to the features' variance


@dataclass(slots=True)
class Sums:
    """Normal equations of targets y [n, C] on features x [n, F], as sums over positions, in float64.

    Args:
        gram: Σ x xᵀ [F, F].
        cross: Σ x yᵀ [F, C].
        square: Σ y² [C].
        mean_x: Σ x [F].
        mean_y: Σ y [C].
        count: n.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    mean_x: Tensor
    mean_y: Tensor
    count: int = 0

    @classmethod
    def empty(cls, features: int, targets: int) -> Sums:
        shapes = ((features, features), (features, targets), (targets,), (features,), (targets,))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in positions x [n, F] with targets y [n, C]."""
        x, y = x.double().cpu(), y.double().cpu()
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, y)
        self.square += (y * y).sum(0)
        self.mean_x += x.sum(0)
        self.mean_y += y.sum(0)
        self.count += len(x)

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
        return float(total) / max(self.count, 1)


@dataclass(frozen=True, slots=True)
class Fit:
    """y ≈ x·weight + shift, weight [F, C] float64, with the ridge that was chosen and its error on left-out positions."""

    weight: Tensor
    shift: Tensor
    ridge: float = 0.0
    error: float = field(default=float("inf"))


def fit_dense(train: Sums, held_out: Sums) -> Fit:
    """Every target from every feature; the ridge is the best on the left-out positions, then all positions are used."""
    best = min((_evaluated(_solve(train, ridge), held_out) for ridge in RIDGES), key=lambda fit: fit.error)
    final = _solve(train + held_out, best.ridge)
    return Fit(final.weight, final.shift, best.ridge, best.error)


def fit_diagonal(sums: Sums, channels: int) -> Fit:
    """Target c from features c, c+C, …: as many features for each channel as there are groups of C features."""
    groups = len(sums.mean_x) // channels
    gram, cross = _centred(sums)
    pick = torch.arange(channels)
    small = torch.stack(
        [torch.stack([gram[pick + i * channels, pick + j * channels] for j in range(groups)], -1) for i in range(groups)],
        -2,
    )
    right = torch.stack([cross[pick + i * channels, pick] for i in range(groups)], -1)
    scale = torch.diagonal(small, dim1=-2, dim2=-1).mean(-1)
    ridge = (1e-4 * scale + 1e-12)[:, None, None] * torch.eye(groups, dtype=torch.float64)
    solved = torch.linalg.solve(small + ridge, right)
    weight = torch.zeros_like(sums.cross)
    for i in range(groups):
        weight[pick + i * channels, pick] = solved[:, i]
    return Fit(weight, (sums.mean_y - sums.mean_x @ weight) / sums.count)


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
        sums.gram[features][:, features], sums.cross[features], sums.square, sums.mean_x[features], sums.mean_y, sums.count
    )


def _centred(sums: Sums) -> tuple[Tensor, Tensor]:
    count = max(sums.count, 1)
    gram = sums.gram - torch.outer(sums.mean_x, sums.mean_x) / count
    cross = sums.cross - torch.outer(sums.mean_x, sums.mean_y) / count
    return gram, cross


def _solve(sums: Sums, ridge: float) -> Fit:
    gram, cross = _centred(sums)
    count = max(sums.count, 1)
    scale = (torch.diagonal(gram) / count).clamp_min(1e-12).sqrt()
    scaled = gram / torch.outer(scale, scale) / count
    scaled += ridge * torch.eye(len(scale), dtype=torch.float64)
    weight = torch.linalg.solve(scaled, cross / scale[:, None] / count) / scale[:, None]
    return Fit(weight, (sums.mean_y - sums.mean_x @ weight) / count, ridge)


def _evaluated(fit: Fit, held_out: Sums) -> Fit:
    return Fit(fit.weight, fit.shift, fit.ridge, held_out.error(fit.weight, fit.shift))
