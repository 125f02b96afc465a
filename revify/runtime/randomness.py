"""The states of random number generators, kept so that many of them take little memory.

The state of the CPU's generator has 5 kB, of which a module that draws a few numbers changes a few bytes: the states of one
forward pass are kept as one of them and what differs from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 64  # differing bytes, up to which a state is kept as what differs


@dataclass(frozen=True, slots=True)
class KeptState:
    """A generator's state as the bytes in which it differs from another.

    Args:
        base: the other.
        places: where it differs.
        values: what it has there.
    """

    base: Tensor
    places: tuple[int, ...] = ()
    values: bytes = b""

    def whole(self) -> Tensor:
        """The state."""
        state = self.base.clone()
        if self.places:
            state[list(self.places)] = torch.tensor(list(self.values), dtype=torch.uint8)
        return state


class Draws:
    """The states that are kept of one forward pass: those that hardly differ share their memory."""

    def __init__(self) -> None:
        self._base: dict[torch.device, Tensor] = {}

    def keep(self, device: torch.device, state: Tensor) -> KeptState:
        """Keep the state of a device's generator."""
        base = self._base.get(device)
        if base is not None and base.shape == state.shape:
            places = (base != state).nonzero().flatten()
            if len(places) <= FEW:
                return KeptState(base, tuple(places.tolist()), bytes(state[places].tolist()))
        self._base[device] = state
        return KeptState(state)


def random_states(device: torch.device) -> dict[torch.device, Tensor]:
    """The state of the CPU's generator, and of the device's."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


@contextmanager
def random_numbers(states: Mapping[torch.device, KeptState]) -> Iterator[None]:
    """Draw from the given states, then put the generators back to where they were."""
    before: dict[torch.device, Tensor] = {}
    for device in states:
        before.update({place: s for place, s in random_states(device).items() if place in states})
    try:
        _set_states({device: kept.whole() for device, kept in states.items()})
        yield
    finally:
        _set_states(before)


def _set_states(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
