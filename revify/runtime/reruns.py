"""A module call whose saved tensors are dropped in forward and had again, by a second run, in backward.

Autograd's graph is real; only what it saved is gone. Forward: every tensor that autograd saves is exchanged for a
placeholder (parameters, buffers and side inputs pass through: they live anyway). Backward: the first placeholder that
is asked for makes the owner run the module again, under hooks that catch the same tensors in the same order. Each is
handed out once and then forgotten; asked for again (a second backward), it is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revify.errors import ReplayError, StreamError
from revify.runtime.replay import Conditions, SideInputs, version

LIKELY_CAUSES = (
    "Likely causes: a non-deterministic kernel (torch.use_deterministic_algorithms(True) finds it), another "
    "attention kernel or thread count in backward than in forward, a block that counts its calls or caches values, "
    "parameters or buffers changed between forward and backward."
)


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Stands in a graph for the tensor that the rerun's `index`-th save dropped.

    It holds on to the owner of the rerun through `load`; the rerun does not, or the two would keep each other alive.
    """

    rerun: Rerun
    load: Callable[[], None]
    index: int
    shape: torch.Size
    dtype: torch.dtype


class Rerun:
    """One call of a module, to be run a second time.

    Args:
        name: the module's path, for errors.
        run: the second run: (*values, *args, **kwargs) → outputs, through `module`.
        module: whose buffers, modes and parameters are involved.
        side: the arguments besides the values.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],  # Any: blocks return what they like
        module: nn.Module,
        side: SideInputs,
    ) -> None:
        self.name = name
        self._run = run
        self._module = module
        self._side = side
        self._conditions: Conditions | None = None
        self._saves = 0
        self._parameters: list[tuple[nn.Parameter, int]] = []
        self._caught: dict[int, tuple[Tensor, int]] = {}

    def first(self, call: Callable[[], Any], device: torch.device, load: Callable[[], None]) -> Any:
        """Run the module in forward, saving nothing.

        Args:
            call: the first run.
            device: where its values live.
            load: called when a dropped tensor is needed; must lead to `again(..., catch=True)`.

        Returns:
            What `call` returns.
        """
        parts = [*self._module.parameters(), *self._module.buffers(), *self._side.tensors()]
        living = {_address(part) for part in parts} - {0}
        self._parameters = [(parameter, version(parameter)) for parameter in self._module.parameters()]

        def drop(tensor: Tensor) -> Tensor | Placeholder:
            index, self._saves = self._saves, self._saves + 1
            if _address(tensor) in living:
                return tensor
            return Placeholder(self, load, index, tensor.shape, tensor.dtype)

        hooks = saved_tensors_hooks(drop, _fetch)
        with Conditions.recorded(self._module, device) as self._conditions, hooks:
            return call()

    def again(self, *values: Tensor, catch: bool) -> Any:
        """Run the module once more under the conditions of its first run.

        Args:
            values: what it was given before the side inputs, cut off from any graph, with its `requires_grad`.
            catch: keep what autograd saves, for the placeholders.

        Returns:
            What the module returned.
        """
        assert self._conditions is not None  # `first` comes first: an invariant, not a check of user input
        self._check_parameters()
        args, kwargs = self._side.again()
        caught: list[tuple[Tensor, int]] = []

        def keep(tensor: Tensor) -> None:
            caught.append((tensor.detach(), version(tensor)))

        hooks: AbstractContextManager[None] = saved_tensors_hooks(
            keep if catch else _forget, partial(_unreadable, self.name)
        )
        with self._conditions.restored(), hooks:
            outputs = self._run(*values, *args, **kwargs)
        if catch:
            if len(caught) != self._saves:
                raise ReplayError(
                    f"{self.name} saved {self._saves} tensors for backward in its first run and {len(caught)} when run "
                    f"again, so its gradients cannot be computed. {LIKELY_CAUSES}"
                )
            self._caught = dict(enumerate(caught))
        return outputs

    def forget(self) -> None:
        """Let go of the caught tensors that nobody asked for."""
        self._caught.clear()

    def fetch(self, placeholder: Placeholder) -> Tensor:
        """The tensor that the placeholder stands for."""
        if placeholder.index not in self._caught:
            placeholder.load()
        tensor, before = self._caught.pop(placeholder.index)
        if version(tensor) != before:
            raise StreamError(
                f"{self.name}: a tensor of shape {tuple(tensor.shape)} that its backward needs was changed in place "
                "within the block, which ordinary autograd refuses, too. Use the out-of-place operation."
            )
        if (tensor.shape, tensor.dtype) != (placeholder.shape, placeholder.dtype):
            raise ReplayError(
                f"{self.name} saved a {placeholder.dtype} tensor of shape {tuple(placeholder.shape)} in its first run "
                f"and a {tensor.dtype} tensor of shape {tuple(tensor.shape)} when run again. {LIKELY_CAUSES}"
            )
        return tensor

    def _check_parameters(self) -> None:
        """Autograd checks no versions of tensors that went through hooks, so this does."""
        for parameter, before in self._parameters:
            if version(parameter) != before:
                raise StreamError(
                    f"{self.name}: a parameter of shape {tuple(parameter.shape)} was changed in place between forward "
                    "and backward, so the block cannot be run again as it ran. Call optimizer.step() after backward()."
                )


def _fetch(kept: Tensor | Placeholder) -> Tensor:
    return kept.rerun.fetch(kept) if isinstance(kept, Placeholder) else kept


def _forget(tensor: Tensor) -> None:
    return None


def _unreadable(name: str, kept: None) -> Tensor:
    raise ReplayError(
        f"{name} ran a backward of its own while it was run again; revify cannot serve that backward. Leave this block "
        "out of the plan, or compute that gradient outside of it."
    )


def _address(tensor: Tensor) -> int:
    """Where the tensor's storage lies; 0 where it has none (sparse tensors, wrappers of other tensors)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0
