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

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from revify.stream import Grid, OnGrid

PREFIX = "revify_"  # of the names under which a block holds its fitted forecast
CALIBRATED = ("diagonal", "lowrank", "linear_z", "linear")
FIXED = ("identity", "midpoint", "zero", "output")


class Predictor(Protocol):
    """A forecast of the previous stream value."""

    def before(self, z: Tensor) -> Tensor:
        """a(z[k]): grid values, the shape of z."""

    def after(self, t: Tensor) -> Tensor | None:
        """c(T(z[k])): grid values of the same shape, or None where the forecast does not look at T."""


class Identity:
    """q(z) = z: the blocks change the stream little (Re2TAL, Zhao et al. 2023, eq. 4)."""

    def before(self, z: Tensor) -> Tensor:
        return z

    def after(self, t: Tensor) -> Tensor | None:
        return None


class Midpoint:
    """q(z) = 2z − T(z): the blocks change it by about the same amount twice (leapfrog; BDIA, Zhang et al. 2025)."""

    def before(self, z: Tensor) -> Tensor:
        return 2 * z

    def after(self, t: Tensor) -> Tensor | None:
        return -t


class Zero:
    """q(z) = 0: what came before is added with a small gain (Dr²Net, Zhao et al. 2024)."""

    def before(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def after(self, t: Tensor) -> Tensor | None:
        return None


class Output:
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

    def before(self, z: Tensor) -> Tensor:
        forecast = torch.addcmul(self._channels("shift", z), self._channels("scale", z), z)
        weight, up, down = (getattr(self.block, PREFIX + n, None) for n in ("weight", "up", "down"))
        if weight is not None:
            forecast = forecast + self._mix(z, weight)
        if up is not None and down is not None:
            forecast = forecast + self._mix(self._mix(z, down), up)
        return OnGrid.apply(forecast, self.grid)

    def after(self, t: Tensor) -> Tensor | None:
        forecast = self._channels("scale_t", t) * t
        weight = getattr(self.block, PREFIX + "weight_t", None)
        if weight is not None:
            forecast = forecast + self._mix(t, weight)
        return OnGrid.apply(forecast, self.grid)

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
        name: one of FIXED or CALIBRATED.
        block: whose previous value is to be forecast.
        axis: the stream's channel axis, needed by the calibrated ones.
        grid: of the stream.
    """
    fixed: dict[str, type[Predictor]] = {"identity": Identity, "midpoint": Midpoint, "zero": Zero, "output": Output}
    if name in fixed:
        return fixed[name]()
    assert axis is not None  # the plan names the axis of every stage with a calibrated predictor
    return Calibrated(block, axis, grid)


def hold_forecast(block: nn.Module, tensors: dict[str, Tensor], *, trainable: bool = False) -> None:
    """Give a block the tensors of its forecast, as buffers or as parameters.

    They are in the block's state_dict, but a checkpoint of the plain model, which lacks them, still loads strictly and
    leaves them as they are.

    Args:
        block: the module.
        tensors: by name without prefix; see `Calibrated`.
        trainable: as parameters, so that an optimizer trains them.
    """
    for name, tensor in tensors.items():
        if trainable:
            block.register_parameter(PREFIX + name, nn.Parameter(tensor))
        else:
            block.register_buffer(PREFIX + name, tensor)
    block.register_load_state_dict_pre_hook(_keep_missing)  # type: ignore[no-untyped-call]


def drop_forecast(block: nn.Module) -> None:
    """Take everything away again that `hold_forecast` gave the block."""
    for name in forecast_names(block):
        delattr(block, name)
    for key, hook in list(block._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _keep_missing:
            del block._load_state_dict_pre_hooks[key]


def forecast_names(block: nn.Module) -> list[str]:
    """The names of the tensors of a block's forecast, prefix included."""
    held = (*block._buffers, *block._parameters)
    return [name for name in held if name.startswith(PREFIX)]


def blank_forecast(predictor: str, channels: int, rank: int, like: Tensor) -> dict[str, Tensor]:
    """The tensors of a calibrated predictor before calibration: q = z.

    Args:
        predictor: one of CALIBRATED.
        channels: C.
        rank: r, for "lowrank".
        like: gives the device.
    """
    shapes: dict[str, tuple[int, ...]] = {"scale": (channels,), "scale_t": (channels,), "shift": (channels,)}
    if predictor in ("linear_z", "linear"):
        shapes["weight"] = (channels, channels)
    if predictor == "linear":
        shapes["weight_t"] = (channels, channels)
    if predictor == "lowrank":
        shapes.update(up=(channels, rank), down=(rank, channels))
    tensors = {name: torch.zeros(shape, device=like.device) for name, shape in shapes.items()}
    tensors["scale"] += 1
    return tensors


def _keep_missing(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    for name in forecast_names(module):
        state_dict.setdefault(prefix + name, getattr(module, name))
