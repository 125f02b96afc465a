"""Cuts that a plan names → layers of half the width, in place: for copies only."""

from __future__ import annotations

from torch import Tensor, nn

from revify.couplings.parts import half_range
from revify.stage_plans import Cut, Side


def apply_cuts(block: nn.Module, cuts: tuple[Cut, ...], channels: int) -> None:
    """Cut the layers of a block, in place: they get parameters of their own.

    Args:
        block: a module that shares no submodules with the given model.
        cuts: what to cut.
        channels: of the stream.
    """
    for cut in cuts:
        path, _, name = cut.path.rpartition(".")
        if cut.side is Side.VALUE:
            owner = block.get_submodule(path)
            value: Tensor = getattr(owner, name)
            _replace(owner, name, _sliced(value, list(value.shape).index(channels), cut.half, channels))
        else:
            _cut_layer(block.get_submodule(cut.path), cut, channels)


def _cut_layer(layer: nn.Module, cut: Cut, channels: int) -> None:
    axis = 1 if cut.side is Side.INPUT else 0
    held = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    for name, value in held:
        if value.dim() > axis and value.shape[axis] == channels:
            _replace(layer, name, _sliced(value, axis, cut.half, channels))
    part = half_range(cut.half, channels)
    size = part.stop - part.start
    facts = {
        Side.INPUT: ("in_features", "in_channels"),
        Side.OUTPUT: ("out_features", "out_channels"),
        Side.CHANNELS: ("in_channels", "out_channels", "groups", "num_features", "num_channels", "dim"),
    }[cut.side]
    for fact in facts:
        if getattr(layer, fact, None) == channels:
            setattr(layer, fact, size)
    for fact in ("normalized_shape", "shape") if cut.side is Side.CHANNELS else ():
        shape = getattr(layer, fact, None)
        if shape is not None:
            setattr(layer, fact, tuple(size if n == channels else n for n in shape))


def _replace(owner: nn.Module, name: str, value: Tensor) -> None:
    if name in owner._parameters:
        old = owner._parameters[name]
        setattr(owner, name, nn.Parameter(value, requires_grad=old is None or old.requires_grad))
    else:
        owner._buffers[name] = value


def _sliced(value: Tensor, axis: int, half: int, channels: int) -> Tensor:
    part = half_range(half, channels)
    return value.detach().narrow(axis, part.start, part.stop - part.start).clone()
