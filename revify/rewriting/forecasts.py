"""The tensors of a fitted predictor: given to a block, and taken away again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revify.runtime.predictors import PREFIX


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


def set_forecast(block: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the forecast that a block holds other values."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(block, PREFIX + name).copy_(tensor)


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
