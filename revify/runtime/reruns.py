"""A module call whose saved tensors are dropped in forward and had again, by a second run, in backward.

Autograd's graph is real; only what it saved is gone. Forward: every tensor that autograd saves is exchanged for a
placeholder (parameters, buffers and side inputs pass through: they live anyway). Backward: the first placeholder that
is asked for makes the owner run the module again, under hooks that catch the same tensors in the same order. Each is
handed out once and then forgotten; asked for again (a second backward), it is made again.

The gradients are those of ordinary autograd if what is caught has the bits of what was dropped. So both runs take a
fingerprint of what autograd saves, and `differs` tells whether they are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revify.errors import ReplayError, StreamError
from revify.runtime.catching import LIKELY_CAUSES, Catcher, EnoughError, refuse_changes
from revify.runtime.conditions import Conditions
from revify.runtime.fingerprints import Fingerprint
from revify.runtime.randomness import Draws
from revify.runtime.replay import SideInputs, address, version
from revify.runtime.states import Habits
from revify.runtime.turns import Turn, current_turn, own_turn


@dataclass(frozen=True, slots=True)
class Living:
    """Stands in a graph for a tensor that lives anyway; autograd checks no versions of what went through hooks."""

    name: str
    tensor: Tensor
    version: int

    def checked(self) -> Tensor:
        """The tensor, unless it was changed in place since autograd saved it."""
        if version(self.tensor) != self.version:
            raise StreamError(
                f"{self.name}: a tensor of shape {tuple(self.tensor.shape)} that its backward needs was changed in place "
                "after the forward pass had used it, which ordinary autograd refuses, too. Call optimizer.step() after "
                "backward(), and use out-of-place operations."
            )
        return self.tensor


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
        module: whose parameters, buffers, modes and attributes are involved.
        side: the arguments besides the values.
        habits: what earlier runs of the module changed, to be kept with the module; None looks at everything anew.
        draws: keeps the random states of this forward pass, for all of its reruns; None for this one alone.
        exact: whether the second run is to save the same values, bit for bit; else only how many, their shapes and types.
        seen: whether the owner compares what the second run gives; else the last saved tensor is compared as a whole.

    Attributes:
        drops: whether anything that the first run saved is to be had again.
        differs: for each device, whether the last second run that caught its saved tensors saved others than the first;
            possibly still being computed.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],  # Any: blocks return what they like
        module: nn.Module,
        side: SideInputs,
        habits: Habits | None = None,
        draws: Draws | None = None,
        *,
        exact: bool = True,
        seen: bool = True,
    ) -> None:
        self.name = name
        self.drops = False
        self.differs: tuple[Tensor, ...] = ()
        self._run = run
        self._module = module
        self._side = side
        self._habits, self._draws = habits or Habits(), draws or Draws()
        self._exact, self._seen = exact, seen
        self._conditions: Conditions | None = None
        self._saves = 0
        self._dropped: set[int] = set()
        self._fingerprint: dict[torch.device, Tensor] = {}
        self._caught: dict[int, tuple[Tensor, int]] = {}
        self._running: Callable[[], Any] | None = None  # the first run, while it goes on
        self._turn: Turn | None = None  # in which the first run was
        self._reads_itself = False  # whether a backward of its own asked for what it had saved

    def first(self, call: Callable[[], Any], device: torch.device, load: Callable[[], None]) -> Any:
        """Run the module in forward, saving nothing.

        Args:
            call: the first run.
            device: where its values live.
            load: called when a dropped tensor is needed; must lead to `again(..., catch=True)`.

        Returns:
            What `call` returns.
        """
        with own_turn():
            self._turn = current_turn()
            return self._first(call, device, load)

    def _first(self, call: Callable[[], Any], device: torch.device, load: Callable[[], None]) -> Any:
        fingerprint = Fingerprint(whole_last=not self._seen)
        with Conditions.recorded(self._module, device, self._habits, self._draws) as self._conditions:
            parts = (*self._conditions.state.tensors, *self._side.tensors())
            living = {address(part) for part in parts} - {0}

            def drop(tensor: Tensor) -> Living | Placeholder:
                index, self._saves = self._saves, self._saves + 1
                if address(tensor) in living:
                    return Living(self.name, tensor, version(tensor))
                self.drops = True
                if self._exact:
                    self._dropped.add(index)
                    fingerprint.add(tensor)
                return Placeholder(self, load, index, tensor.shape, tensor.dtype)

            self._running = call
            try:
                with saved_tensors_hooks(drop, _fetch):
                    outputs = call()
            finally:
                self._running = None
                self._caught.clear()
        with torch.no_grad():
            self._fingerprint = fingerprint.value()
        return outputs

    def again(self, *values: Tensor, catch: bool, outputs: bool = True) -> Any:
        """Run the module once more under the conditions of its first run.

        Args:
            values: what it was given before the side inputs, cut off from any graph, with its `requires_grad`.
            catch: keep what autograd saves, for the placeholders.
            outputs: whether what it returns is needed; else the run may end at the last tensor that autograd saves.

        Returns:
            What the module returned, None where it is not needed.
        """
        with own_turn(self._turn):
            return self._again(*values, catch=catch, outputs=outputs)

    def _again(self, *values: Tensor, catch: bool, outputs: bool) -> Any:
        assert self._conditions is not None  # `first` comes first: an invariant, not a check of user input
        moved = self._conditions.state.moved()
        args, kwargs = self._side.again()
        catcher = Catcher(self._saves, self._dropped, Fingerprint(whole_last=not self._seen), self.name)
        catcher.ends = catch and not outputs and not moved
        pack = catcher.keep if catch else _detached if self._reads_itself else _forget
        hooks: AbstractContextManager[None] = saved_tensors_hooks(pack, partial(_own, self.name))
        found: Any = None
        with self._conditions.restored(), hooks, suppress(EnoughError):
            found = self._run(*values, *args, **kwargs)
        refuse_changes(self.name, moved, found)
        if catch:
            self._caught = catcher.all_caught()
            with torch.no_grad():
                again = catcher.fingerprint.value()
            self.differs = tuple(again[device] != number for device, number in self._fingerprint.items())
        return found

    def forget(self) -> None:
        """Let go of the caught tensors that nobody asked for."""
        self._caught.clear()

    def fetch(self, placeholder: Placeholder) -> Tensor:
        """The tensor that the placeholder stands for."""
        caught = self._caught.pop(placeholder.index, None)
        if caught is None:
            with own_turn(self._turn):
                (placeholder.load if self._running is None else self._look_inside)()
                caught = self._caught.pop(placeholder.index)
        tensor, before = caught
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

    def _look_inside(self) -> None:
        """Have what the first run saved so far, for a backward of the module's own: by one more run, from the start."""
        assert self._conditions is not None  # the first run goes on
        assert self._running is not None
        self._reads_itself, run = True, self._running
        catcher = Catcher(0, set(), Fingerprint(whole_last=False), self.name)
        with self._conditions.restored(), saved_tensors_hooks(catcher.keep, partial(_own, self.name)):
            run()
        self._caught = catcher.caught()


def _fetch(kept: Living | Placeholder) -> Tensor:
    return kept.rerun.fetch(kept) if isinstance(kept, Placeholder) else kept.checked()


def _forget(tensor: Tensor) -> None:
    return None


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _own(name: str, kept: Tensor | None) -> Tensor:
    if kept is None:
        raise ReplayError(
            f"{name} ran a backward of its own when it was run again, and had not in its first run. {LIKELY_CAUSES}"
        )
    return kept
