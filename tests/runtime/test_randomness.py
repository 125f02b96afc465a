"""Random numbers repeat, and their generators' states are kept in little memory."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

import revify
from revify.runtime.randomness import Draws

CPU = torch.device("cpu")


def test_states_that_hardly_differ_share_their_memory() -> None:
    torch.manual_seed(0)
    torch.rand(1)  # a state that is not that of a fresh seed
    draws, kept, expected = Draws(), [], []
    for _ in range(300):
        kept.append(draws.keep(CPU, torch.get_rng_state()))
        expected.append(torch.get_rng_state())
        torch.rand(3)
        torch.randn(1)
    assert all(torch.equal(state.whole(), whole) for state, whole in zip(kept, expected, strict=True))
    assert len({id(state.base) for state in kept}) < 6


def test_states_far_from_each_other() -> None:
    draws, kept, expected = Draws(), [], []
    for _ in range(5):
        kept.append(draws.keep(CPU, torch.get_rng_state()))
        expected.append(torch.get_rng_state())
        torch.rand(5000)
    assert all(torch.equal(state.whole(), whole) for state, whole in zip(kept, expected, strict=True))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.drop(torch.tanh(self.one(x))))


def held(depth: int) -> int:
    """Bytes of all states that are kept between forward and backward."""
    torch.manual_seed(0)
    model = revify.convert(nn.Sequential(*(Dropping() for _ in range(depth))), torch.randn(64, 4), bits=0)
    gc.collect()
    before = {id(t) for t in gc.get_objects() if type(t) is Tensor}
    loss = model(torch.randn(64, 4)).sum()
    states = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in before and t.dtype == torch.uint8]
    loss.backward()
    return sum({t.data_ptr(): t.nbytes for t in states}.values())


def test_what_is_held_of_generators_does_not_grow_with_depth() -> None:
    assert held(4) == held(16) == held(64) == 0
