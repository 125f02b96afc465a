"""Predictors: q(z[k]) ≈ z[k-1], the forecast whose error γ scales into the next value.

A forecast is q = a(z[k]) + c(T(z[k])), in two parts: the part known before the branch runs, and the part that also
looks at the branch's output. Both are grid values with a gradient.

    zero       q = 0                              Dr²Net, MEFT
    output     q = T(z)                           IDM at γ = 1/2
    identity   q = z                              Re2TAL, Rev-ViT, Reformer at γ = 1
    midpoint   q = 2z − T(z)                      leapfrog at γ = 1; BDIA at γ = ±1/2
    diagonal   q = s⊙z + s'⊙T(z) + d              per channel, calibrated
    lowrank    q = s⊙z + U V z + s'⊙T(z) + d      rank r, calibrated
    linear_z   q = s⊙z + A z + s'⊙T(z) + d        C×C, calibrated
    linear     q = s⊙z + A z + s'⊙T(z) + B T(z) + d, calibrated
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from revify.runtime.grid import Grid, OnGrid

PREFIX = "revify_"  # of the names under which a block holds its fitted forecast


class Predictor(Protocol):
    """A forecast of the previous stream value."""

    def before(self, z: Tensor) -> Tensor:
        """a(z[k]): grid values, the shape of z."""

    def after(self, t: Tensor) -> Tensor | None:
        """c(T(z[k])): grid values of the same shape, or None where the forecast does not look at T."""

    def on(self, block: nn.Module) -> Self:
        """The same for a copy of the block."""


class _Fixed:
    """A forecast that nothing was fitted for."""

    def on(self, block: nn.Module) -> Self:
        return self


class Identity(_Fixed):
    """q(z) = z: the blocks change the stream little (Re2TAL, Zhao et al. 2023, eq. 4)."""

    def before(self, z: Tensor) -> Tensor:
        return z

    def after(self, t: Tensor) -> Tensor | None:
        return None


class Midpoint(_Fixed):
    """q(z) = 2z − T(z): the blocks change it by about the same amount twice (leapfrog; BDIA, Zhang et al. 2025)."""

    def before(self, z: Tensor) -> Tensor:
        return 2 * z

    def after(self, t: Tensor) -> Tensor | None:
        return -t


class Zero(_Fixed):
    """q(z) = 0: what came before is added with a small gain (Dr²Net, Zhao et al. 2024)."""

    def before(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def after(self, t: Tensor) -> Tensor | None:
        return None


class Output(_Fixed):
    """q(z) = T(z): the next value is a mean of the block's output and the previous value (IDM, Wang et al. 2025)."""

    def before(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def after(self, t: Tensor) -> Tensor | None:
        return t


class Calibrated:
    """q(z) = s⊙z + M z + s'⊙T(z) + B T(z) + d, with what was fitted held as tensors of the block.

    Args:
        block: the module that holds `revify_scale`, `revify_scale_t`, `revify_shift` [C] and, for M, `revify_weight`
            [C, C] or `revify_up` [C, r] and `revify_down` [r, C]; for B `revify_weight_t` [C, C].
        axis: the channel axis of the stream, counted from its front.
        grid: of the stream.
    """

    def __init__(self, block: nn.Module, axis: int, grid: Grid) -> None:
        self.block, self.axis, self.grid = block, axis, grid

    def on(self, block: nn.Module) -> Self:
        return type(self)(block, self.axis, self.grid)

    def before(self, z: Tensor) -> Tensor:
        z = self._short(z)
        forecast = torch.addcmul(self._channels("shift", z), self._channels("scale", z), z)
        weight, up, down = (getattr(self.block, PREFIX + n, None) for n in ("weight", "up", "down"))
        if weight is not None:
            forecast = forecast + self._mix(z, weight)
        if up is not None and down is not None:
            forecast = forecast + self._mix(self._mix(z, down), up)
        return OnGrid.apply(forecast, self.grid)

    def after(self, t: Tensor) -> Tensor | None:
        t = self._short(t)
        forecast = self._channels("scale_t", t) * t
        weight = getattr(self.block, PREFIX + "weight_t", None)
        if weight is not None:
            forecast = forecast + self._mix(t, weight)
        return OnGrid.apply(forecast, self.grid)

    def _short(self, values: Tensor) -> Tensor:
        """A forecast is no better for being computed in float64, and would be slow."""
        return values.float() if self.grid.is_wide else values

    def _channels(self, name: str, like: Tensor) -> Tensor:
        values: Tensor = getattr(self.block, PREFIX + name)
        return values.to(like.dtype).view(-1, *(1,) * (like.dim() - self.axis - 1))

    def _mix(self, values: Tensor, weight: Tensor) -> Tensor:
        """weight [O, C] applied to the channels at every position."""
        weight = weight.to(values.dtype)
        if self.axis == values.dim() - 1:
            return functional.linear(values, weight)
        if self.axis == 1 and values.dim() == 4:
            return functional.conv2d(values, weight[:, :, None, None])
        return functional.linear(values.movedim(self.axis, -1), weight).movedim(-1, self.axis)


def make_predictor(name: str, block: nn.Module, axis: int | None, grid: Grid) -> Predictor:
    """The predictor of this name for one block.

    Args:
        name: one of `revify.words.FIXED` or `CALIBRATED`.
        block: whose previous value is to be forecast.
        axis: the stream's channel axis, needed by the calibrated ones.
        grid: of the stream.
    """
    fixed: dict[str, type[Predictor]] = {"identity": Identity, "midpoint": Midpoint, "zero": Zero, "output": Output}
    if name in fixed:
        return fixed[name]()
    assert axis is not None  # the plan names the axis of every stage with a calibrated predictor
    return Calibrated(block, axis, grid)
