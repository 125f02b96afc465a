"""What a module was given in its first run, to be given again in a second one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from revify.errors import StreamError


@dataclass(frozen=True, slots=True)
class SideInputs:
    """What a block is given besides the stream: positions, masks, sizes; kept by reference.

    Args:
        leaves: every argument, tensors detached.
        needs_grad: for each, whether it was a tensor with a gradient.
        versions: for each tensor, its version when the block ran; None for other values.
        spec: how `leaves` become (args, kwargs) again.
    """

    leaves: tuple[Any, ...]  # Any: a block's arguments may be of every type
    needs_grad: tuple[bool, ...]
    versions: tuple[int | None, ...]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SideInputs:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        return cls(
            tuple(leaf.detach() if is_tensor else leaf for leaf, is_tensor in zip(leaves, tensor, strict=True)),
            tuple(is_tensor and leaf.requires_grad for leaf, is_tensor in zip(leaves, tensor, strict=True)),
            tuple(version(leaf) if is_tensor else None for leaf, is_tensor in zip(leaves, tensor, strict=True)),
            spec,
        )

    def tensors(self) -> Iterator[Tensor]:
        return (leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) for a second run, cut off from the graph of the first."""
        fresh = []
        for leaf, needs_grad, before in zip(self.leaves, self.needs_grad, self.versions, strict=True):
            if isinstance(leaf, Tensor):
                if version(leaf) != before:
                    raise StreamError(
                        f"a side input of shape {tuple(leaf.shape)} was changed in place between forward and backward; "
                        "the block cannot be run again as it ran. Work on a clone of it."
                    )
                leaf = leaf.detach().requires_grad_(needs_grad)
            fresh.append(leaf)
        args, kwargs = pytree.tree_unflatten(fresh, self.spec)
        return args, kwargs


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it, and no backward needs them."""
    return 0 if tensor.is_inference() else tensor._version


def without_graph(tensor: Tensor) -> Tensor:
    """The tensor as a leaf with a gradient: what holds on to it holds its values, not the graph that gave them."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def address(tensor: Tensor) -> int:
    """Where the tensor's storage lies; 0 where it has none (sparse tensors, wrappers of other tensors)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0
