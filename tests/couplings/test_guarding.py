"""Couplings that scale by exp(t) and sigmoid(s + 2): derived, trained, and looked at in every run."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from asserts import difference, run
from test_reversible import Branch, sequence, tokens
from torch import Tensor, exp, nn, tanh

import revify
from revify import RefusalError, Reversible, ReversibleSequence
from revify.couplings import EvenOdd, check, derive, exponential, glow, guarded
from revify.couplings.intervals import LARGEST, LINE, SMALLEST, Interval


@pytest.mark.parametrize("formula", [exponential, glow])
def test_numbers_confirm_what_is_derived(formula) -> None:
    assert check(formula).sound


def test_the_printed_inverse_and_determinant() -> None:
    assert "x1 = (y1 − t) / exp(t)" in str(derive(exponential))
    assert derive(exponential).determinant.text == "exp(Σ t + Σ t′)"
    assert derive(glow).determinant.text == "Π (sigmoid(s + 2)) · Π (sigmoid(s′ + 2))"


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        (LINE.exp(), Interval(SMALLEST, LARGEST)),
        (LINE.sigmoid(), Interval(SMALLEST, 1)),
        (-LINE.exp(), Interval(-LARGEST, -SMALLEST)),
        (LINE.tanh() + 1, Interval(SMALLEST, 2)),
        (LINE.tanh(), LINE.tanh()),
        (LINE, LINE),
        (Interval(0, 0), Interval(0, 0)),
    ],
)
def test_a_guard_leaves_what_can_be_divided_by(bounds: Interval, left: Interval) -> None:
    assert bounds.guarded() == left


def test_the_refusal_of_an_unbounded_factor_says_the_way_round() -> None:
    with pytest.raises(RefusalError, match=r"let every run look: guarded\(exp\(s\)\)\.$"):
        derive(lambda x1, x2, F: (x1 * exp(F(x2)), x2))
    with pytest.raises(RefusalError, match=r"as exp\(tanh\(s\)\) does\.$"):
        derive(lambda x1, x2, F: (x1 * guarded(F(x2)), x2))


def test_a_formula_of_your_own() -> None:
    def realnvp(x1, x2, F):
        s, t = F(x2)
        return x2, x1 * guarded(exp(s)) + t

    assert check(realnvp).sound
    assert check(lambda x1, x2, F: (x1 / guarded(1 + tanh(F(x2))), x2)).sound


class Pair(Branch):
    """A branch with twice the channels."""

    def __init__(self) -> None:
        super().__init__(3, 6)


def sequence_of(formula, depth: int) -> ReversibleSequence:
    if formula is exponential:
        return sequence(formula, depth)
    torch.manual_seed(0)
    return ReversibleSequence(
        Reversible(EvenOdd(Pair(), -1), EvenOdd(Pair(), -1), coupling=glow, dim=-1) for _ in range(depth)
    )


@pytest.mark.parametrize("formula", [exponential, glow])
@pytest.mark.parametrize("depth", [1, 4])
def test_gradients_and_inverse_are_those_of_autograd_to_rounding(formula, depth: int) -> None:
    model, x = sequence_of(formula, depth).double(), tokens().double()
    expected, found = run(model, [x], plain=True), run(model, [x])
    scale = max(float(g.abs().max()) for n, g in expected.items() if n.startswith("grad"))
    assert scale > 0.1
    for name, value in expected.items():
        assert difference(found[name], value) <= 1e-11 * scale, name
    model.eval()
    assert difference(model.inverse(model(x)).detach(), x) <= 1e-11


def test_even_channels_are_the_shift_and_odd_ones_the_scale() -> None:
    s, t = EvenOdd(nn.Identity())(torch.arange(6.0).view(1, 6, 1, 1))
    assert s.flatten().tolist() == [1, 3, 5]
    assert t.flatten().tolist() == [0, 2, 4]


class Log(nn.Module):
    """Gives this log-scale everywhere."""

    def __init__(self, s: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s))

    def forward(self, x: Tensor) -> Tensor:
        return self.s.expand_as(x)


@pytest.mark.parametrize("s", [-200.0, -100.0])
def test_a_factor_that_cannot_be_divided_by_is_an_error_in_backward_and_inverse_only(s: float) -> None:
    block = Reversible(Log(s), Log(0.0), coupling=exponential, dim=-1)
    model = ReversibleSequence([block, Reversible(Log(0.0), Log(0.0), coupling=exponential, dim=-1)])
    with torch.no_grad():
        y = model(tokens())
    assert y.isfinite().all()
    with pytest.raises(
        revify.StreamError,
        match=r"block 0 .exponential.: a factor of its coupling reached",
    ):
        model(tokens()).sum().backward()
    with pytest.raises(revify.StreamError, match=r"block 0 .exponential.: a factor .* cannot divide by that"):
        model.inverse(y)
    with revify.plain_backward():
        model(tokens()).sum().backward()


def test_a_factor_that_overflows_flows_as_in_the_plain_model() -> None:
    block = Reversible(Log(200.0), Log(0.0), coupling=exponential, dim=-1)
    y = block(tokens())
    assert not y.isfinite().all()
    y.sum().backward()
    assert not math.isfinite(block.F.s.grad)


@pytest.mark.parametrize("coupling", [exponential, glow], ids=lambda c: c.__name__)
def test_a_converted_model_with_split_streams(coupling) -> None:
    torch.manual_seed(0)
    model, x = zoo.PreNormBlocks().double(), torch.randn(2, 5, 6).double()
    model = revify.convert(model, x, streams="split", coupling=coupling)
    expected, found = run(model, [x], plain=True), run(model, [x])
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-11 * value.norm().clamp_min(1e-3), name  # rounding, over 1/sigmoid(2)
