"""Module → what its blocks hold beside what autograd saves: attributes that keep a value, custom Functions that keep theirs.

A run in which everything that autograd saves is dropped; what was made in it and is still there in the end, somebody holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revify.reading.tracing import Example, call_with, run_copy


def watch_holdings(model: nn.Module, example: Example, paths: Collection[str]) -> dict[str, int]:
    """The bytes that were made within each block's call, or returned by it, and are there after the forward pass.

    Args:
        model: any module; it stays as it is.
        example: its inputs.
        paths: of the blocks.
    """
    return run_copy(model, example, partial(_watched, paths=paths))


class _Makers(TorchDispatchMode):
    """Notes every storage that is made, without holding it, with the block that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = ""
        self._made: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        outputs = function(*args, **(kwargs or {}))
        for storage in _storages(outputs):
            if storage._cdata not in given:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._made[storage._cdata] = reference, storage.nbytes(), self.block
        return outputs

    def alive(self, but: set[int]) -> dict[str, int]:
        """The bytes that are still there, by block, without those of the storages that are left out."""
        found: dict[str, int] = {}
        for cdata, (reference, size, block) in self._made.items():
            gone = reference.expired()  # type: ignore[no-untyped-call]
            if block and cdata not in but and not gone:
                found[block] = found.get(block, 0) + size
        return found


def _watched(model: nn.Module, example: Example, paths: Collection[str]) -> dict[str, int]:
    makers = _Makers()
    for path in paths:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda *_, path=path: setattr(makers, "block", path))
        module.register_forward_hook(lambda *_: setattr(makers, "block", ""), always_call=True)
    try:
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, _unread), makers:
            output = call_with(model, example)
    except _BackwardWithinError:
        return {}
    return makers.alive({storage._cdata for storage in _storages(output)})


class _BackwardWithinError(Exception):
    """The model runs a backward of its own, which needs what this run drops: what it holds is not known then."""


def _unread(kept: None) -> Tensor:
    raise _BackwardWithinError


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors among the values; sparse tensors have none of their own."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()
