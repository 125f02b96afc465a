"""What must repeat when a block runs a second time, and what must not happen twice.

Repeats: the random numbers, the autocast state, train or eval mode, the side inputs. Happens once: buffer updates
(BatchNorm statistics, counters): the second run works on copies of the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revify.errors import StreamError
from revify.runtime.predictors import PREFIX


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast state of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype


@dataclass(slots=True)
class Conditions:
    """Under which conditions a module ran.

    Args:
        module: the module that ran.
        device: where its stream lives.
        training: the mode of each of its submodules.
        autocast: the state of each device type involved.
        random: the RNG state of each device from which the run drew numbers.
    """

    module: nn.Module
    device: torch.device
    training: tuple[bool, ...]
    autocast: tuple[Autocast, ...]
    random: dict[torch.device, Tensor]

    @classmethod
    @contextmanager
    def recorded(cls, module: nn.Module, device: torch.device) -> Iterator[Conditions]:
        """Note the conditions in which the body runs `module`; RNG states stay only where it drew numbers."""
        autocast = tuple(
            Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", device.type})
        )
        training = tuple(part.training for part in module.modules())
        before = _random_states(device)
        conditions = cls(module, device, training, autocast, {})
        yield conditions
        after = _random_states(device)
        conditions.random = {place: s for place, s in before.items() if not torch.equal(s, after[place])}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run the body under the same conditions; on leaving, everything is as it was before."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for state in self.autocast:
                stack.enter_context(torch.autocast(state.device_type, state.dtype, enabled=state.enabled))
            if self.random:
                stack.enter_context(_random_numbers(self.random))
            stack.enter_context(_modes(self.module, self.training))
            stack.enter_context(_spare_buffers(self.module))
            yield


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


def _random_states(device: torch.device) -> dict[torch.device, Tensor]:
    states = {torch.device("cpu"): torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


@contextmanager
def _random_numbers(states: dict[torch.device, Tensor]) -> Iterator[None]:
    """Draw from the given states, then put the generators back to where they were."""
    before: dict[torch.device, Tensor] = {}
    for device in states:
        before.update({place: s for place, s in _random_states(device).items() if place in states})
    try:
        _set_random_states(states)
        yield
    finally:
        _set_random_states(before)


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _modes(module: nn.Module, training: tuple[bool, ...]) -> Iterator[None]:
    parts = list(module.modules())
    now = tuple(part.training for part in parts)
    if now == training:
        yield
        return
    try:
        for part, mode in zip(parts, training, strict=True):
            part.training = mode
        yield
    finally:
        for part, mode in zip(parts, now, strict=True):
            part.training = mode


def _may_change(name: str) -> bool:
    """Buffers of a forecast are fixed, and as large as a layer's weights: no need for copies."""
    return not name.startswith(PREFIX)


@contextmanager
def _spare_buffers(module: nn.Module) -> Iterator[None]:
    """Let the body read and update copies of the buffers; the module has its own back afterwards."""
    owners = [(part, dict(part._buffers)) for part in module.modules() if part._buffers]
    try:
        for part, buffers in owners:
            part._buffers.update({n: b.clone() for n, b in buffers.items() if b is not None and _may_change(n)})
        yield
    finally:
        for part, buffers in owners:
            part._buffers.update(buffers)
