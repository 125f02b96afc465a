"""Random numbers repeat, and their generators' states are kept in little memory."""

from __future__ import annotations

import gc

import pytest
import torch
from asserts import assert_same, run
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


class Sections(nn.Module):
    """Blocks, and around them modules that are no blocks: each is checkpointed by itself."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.stem = nn.ModuleList(self._section() for _ in range(count))
        self.blocks = nn.Sequential(*(Dropping() for _ in range(2)))

    @staticmethod
    def _section() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        for section in self.stem:
            x = section(x * 2)
        return self.blocks(x)


def held(model: nn.Module) -> int:
    """How many states of the generator are kept between forward and backward."""
    gc.collect()
    before = {id(t) for t in gc.get_objects() if type(t) is Tensor}
    loss = model(torch.randn(64, 4)).sum()
    size = torch.get_rng_state().numel()
    states = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in before and t.numel() == size]
    loss.backward()
    return len({t.data_ptr() for t in states})


@pytest.mark.parametrize("options", [{}, {"unit": "branch"}, {"step": "recurrence"}, {"streams": "split"}])
@pytest.mark.sampled(2)
def test_no_states_are_held_at_any_depth(options: dict[str, str]) -> None:
    torch.manual_seed(0)
    for depth in (4, 24):
        net = nn.Sequential(*(Dropping() for _ in range(depth)))
        assert held(revify.convert(net, torch.randn(64, 4), **options)) == 0


def test_no_states_are_held_for_checkpoints_outside_of_stages() -> None:
    torch.manual_seed(0)
    model = revify.convert(Sections(12), torch.randn(64, 4))
    assert len(model.revify_plan.checkpointed) == 12
    assert held(model) == 0
    x = torch.randn(64, 4)
    assert_same(run(model, [x]), run(model, [x], plain=True))
