"""Side inputs that are the block's own stream, or a view of it: kept as how they view it, not as what they view.

A view keeps all of the value that it is a view of. Held for each block, the stream would be there as often as there are
blocks; but when a block runs again its stream is at hand, and the view can be had from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class View:
    """Stands for a view of the stream.

    Args:
        dtype: of the stream as the block was given it.
        shape: of the view.
        stride: of the view.
        offset: of its first element, from the stream's.
        needs_grad: whether it had a gradient.
    """

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    needs_grad: bool

    def of(self, z: Tensor) -> Tensor:
        """The view of a stream value, as a leaf."""
        x = z.detach().to(self.dtype)
        return x.as_strided(self.shape, self.stride, int(x.storage_offset()) + self.offset).requires_grad_(
            self.needs_grad
        )


def without_views(side: Any, x: Tensor, z: Tensor) -> Any:
    """Side inputs with a `View` for each view of x, which is z, or z in a shorter type."""
    if x.stride() != z.stride():
        return side

    def kept(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != x.dtype or _memory(value) != _memory(x):
            return value
        offset = int(value.storage_offset()) - int(x.storage_offset())
        return View(x.dtype, value.shape, tuple(value.stride()), offset, value.requires_grad)

    return pytree.tree_map(kept, side)


def with_views(side: Any, z: Tensor) -> Any:
    """The side inputs again, with views of z."""
    return pytree.tree_map(lambda value: value.of(z) if isinstance(value, View) else value, side)


def _memory(tensor: Tensor) -> tuple[int, torch.device] | None:
    """Where a tensor's memory begins; None, unlike every other, where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr(), tensor.device
    except (NotImplementedError, RuntimeError):  # sparse tensors, wrappers of other tensors
        return None
