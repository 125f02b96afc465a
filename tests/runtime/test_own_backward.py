"""Blocks that run a backward of their own in forward: energies, gradient penalties, implicit layers."""

from __future__ import annotations

import contextlib

import pytest
import torch
import zoo
from asserts import Count, assert_same, assert_same_gradients, converted, difference, inputs_of, run
from torch import Tensor, nn

import revify
from revify import Invertible, Reversible, ReversibleSequence
from revify.couplings import additive, damped, exponential


class Slope(nn.Module):
    """The slope of an energy, by autograd, with a graph of its own or without one."""

    def __init__(self, width: int = 6, *, graph: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 5))
        self.graph, self.count = graph, Count()

    def forward(self, x: Tensor) -> Tensor:
        self.count.up()
        with torch.enable_grad():
            given = x if x.requires_grad else x.detach().requires_grad_()
            energy = torch.tanh(self.inner(given)).square().sum()
            (slope,) = torch.autograd.grad(energy, given, create_graph=self.graph, retain_graph=True)
        return slope + 0.1 * self.inner(x).mean(-1, keepdim=True)


class Downhill(nn.Module):
    """A residual block whose branch is such a slope."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.norm, self.slope = nn.LayerNorm(6), Slope(**options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.slope(self.norm(x))


class Twofold(Downhill):
    """Two such branches."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.slope(self.norm(x) / 2)


class SlopeStem(zoo.Net):
    """Outside of the stages, in what is checkpointed."""

    def __init__(self) -> None:
        super().__init__(*(zoo.Mlp() for _ in range(3)))
        self.stem = nn.Sequential(nn.Linear(6, 6), Slope())


WAYS = [{"bits": 1}, {"bits": 1, "unit": "branch"}, {"streams": "split"}]
KINDS = {
    "with a graph": lambda: zoo.Net(*(Downhill() for _ in range(4))),
    "without a graph": lambda: zoo.Net(*(Downhill(graph=False) for _ in range(4))),
    "with dropout": lambda: zoo.Net(*(Downhill(dropout=0.3) for _ in range(4))),
    "twice": lambda: zoo.Net(*(Twofold() for _ in range(4))),
    "in the stem": SlopeStem,
}


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.sampled(3)
def test_gradients_of_converted_models(kind: str, options: dict[str, object], autocast: torch.dtype | None) -> None:
    assert_same_gradients(converted(KINDS[kind], **options), inputs_of(KINDS[kind]()), autocast=autocast)


def chain(coupling: object, depth: int = 3, **options: object) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence(
        Reversible(Slope(3, **options), Slope(3, **options), coupling=coupling, dim=-1) for _ in range(depth)
    )


@pytest.mark.parametrize("coupling", [additive, damped])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_blocks_made_by_hand(coupling: object, depth: int, dropout: float) -> None:
    model, x = chain(coupling, depth, dropout=dropout), [torch.randn(2, 5, 6)]
    expected = run(model, x, plain=True)
    assert expected["input 0"].any()
    assert_same(run(model, x), expected)


def test_blocks_made_by_hand_in_floats() -> None:
    model, x = chain(exponential).double(), [torch.randn(2, 5, 6).double()]
    expected, found = run(model, x, plain=True), run(model, x)
    for name, value in expected.items():
        assert difference(found[name], value) <= 1e-11 * float(expected["input 0"].abs().max()), name  # rounding


def test_an_invertible_pair() -> None:
    slope = Slope(3).double()
    pair = Invertible(lambda a, b: (a + slope(b), b), lambda a, b: (a - slope(b), b))
    found = []
    x = torch.randn(2, 5, 6).double()
    for plain in (True, False):
        slope.zero_grad()
        with revify.plain_backward() if plain else contextlib.nullcontext():
            a, b = pair(*x.clone().requires_grad_().chunk(2, -1))
        (a * b).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in slope.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-11, atol=1e-11)


def test_a_second_order_gradient_through_such_blocks() -> None:
    model, outcomes = chain(additive).double(), []
    for plain in (True, False):
        x = torch.linspace(-1, 1, 60).view(2, 5, 6).double().requires_grad_()
        with revify.plain_backward() if plain else contextlib.nullcontext():
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            outcomes.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-10, atol=1e-10)


def test_what_it_costs_is_one_more_run_in_forward() -> None:
    """The first run stores nothing, so a backward within it has the block run from its start once more."""
    model = chain(additive, 2)
    y = model(torch.randn(2, 5, 6))
    assert [block.F.count.number for block in model] == [2, 2]
    y.sum().backward()
    assert [block.F.count.number for block in model] == [3, 3]


class Fickle(Slope):
    """Runs a backward of its own in its second run only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[..., :3] if self.count.up() < 2 else super().forward(x)


def test_a_backward_that_comes_in_the_second_run_only_is_an_error() -> None:
    torch.manual_seed(0)
    model = ReversibleSequence([Reversible(Fickle(3), nn.Linear(3, 3), dim=-1) for _ in range(2)])
    with pytest.raises(revify.ReplayError):
        model(torch.randn(2, 5, 6)).sum().backward()
