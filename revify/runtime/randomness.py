"""The states of random number generators, kept so that many of them take little memory.

The state of the CPU's generator has 5 kB, too much to be held for every block. So what trains and runs twice, a block of a
stage or a checkpoint outside of them, draws from the generator as seeded with a number that follows from its state
(`own_numbers`, in whatever way a backward comes), and only this seed is held. Elsewhere the states of one forward pass
are held as one of them and what differs from it, which is little after a few numbers. On a GPU a state is a seed and an
offset anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from revify.runtime.torch_internals import is_exporting
from revify.runtime.turns import own_turn

FEW = 64  # differing bytes, up to which a state is kept as what differs


@dataclass(frozen=True, slots=True)
class KeptSeed:
    """A generator's state just after it was seeded."""

    seed: int

    def whole(self) -> Tensor:
        """The state."""
        return torch.Generator().manual_seed(self.seed).get_state()


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

    def keep(self, device: torch.device, state: Tensor) -> KeptState | KeptSeed:
        """Keep the state of a device's generator."""
        if device.type == "cpu":
            seeded = KeptSeed(torch.initial_seed())
            if torch.equal(seeded.whole(), state):
                return seeded
        base = self._base.get(device)
        if base is not None and base.shape == state.shape:
            places = (base != state).nonzero().flatten()
            if len(places) <= FEW:
                return KeptState(base, tuple(places.tolist()), bytes(state[places].tolist()))
        self._base[device] = state
        return KeptState(state)


@contextmanager
def own_numbers(*, draws: bool) -> Iterator[None]:
    """Let the body draw from the CPU's generator as seeded with a number that follows from its state.

    Args:
        draws: whether the body may draw at all; if it does not, the generator is as it was.
    """
    if not draws or is_exporting():
        yield
        return
    with own_turn():
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(_seed_from(before))
        seeded = torch.get_rng_state()
        try:
            yield
        finally:
            if torch.equal(torch.get_rng_state(), seeded):
                torch.set_rng_state(before)


def _seed_from(state: Tensor) -> int:
    """A number of 32 bits that changes with every draw."""
    words = state.view(torch.int64)  # the second counts the draws from those that follow
    return (int(words.sum()) + 2654435761 * int(words[1])) % 2**32


def random_states(device: torch.device) -> dict[torch.device, Tensor]:
    """The state of the CPU's generator, and of the device's."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


@contextmanager
def random_numbers(states: Mapping[torch.device, KeptState | KeptSeed]) -> Iterator[None]:
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
