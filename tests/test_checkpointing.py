"""Transitions that run again in backward: the same bits, the same manners as the stages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from asserts import assert_same, assert_same_gradients, converted, gradients, inputs_of, run
from test_memory import Ledger
from torch import Tensor, nn

import revify


def net(**options: object) -> nn.Module:
    return converted(zoo.TwoStages, transitions="checkpoint", **options)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 3])
def test_same_gradients(bits: int, autocast: torch.dtype | None) -> None:
    model = net(bits=bits)
    found = assert_same_gradients(model, inputs_of(model), autocast=autocast)
    kept = run(converted(zoo.TwoStages, bits=bits), inputs_of(model), autocast=autocast)
    assert_same(found, kept)


def test_counts_batches_once() -> None:
    model = net()
    model(*inputs_of(model)).sum().backward()
    assert int(model.transition[1].num_batches_tracked) == 1


def test_holds_less() -> None:
    alive = []
    for transitions in ("keep", "checkpoint"):
        model = converted(zoo.TwoStages, transitions=transitions, bits=0)
        with Ledger() as ledger:
            output = model(*inputs_of(model))
            alive.append(ledger.alive())
        del output
    assert alive[1] < alive[0]


@pytest.mark.parametrize("retain", [True, False])
def test_two_forwards_and_two_backwards(retain: bool) -> None:
    model = net(bits=1)
    one, two = inputs_of(model, 1)[0], inputs_of(model, 2)[0]
    found = []
    for plain in (True, False):
        model.zero_grad()
        torch.manual_seed(0)
        with revify.plain_backward() if plain else torch.enable_grad():
            a, b = model(one).square().sum(), model(two).square().sum()
            if retain:
                a.backward(retain_graph=True)
            (a + b).backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


def test_without_gradients() -> None:
    model = net().eval()
    x = inputs_of(model)
    with torch.no_grad():
        output = model(*x)
    assert torch.equal(output, model(*x))
    assert not output.requires_grad


def test_double_backward() -> None:
    model = net(bits=1)
    x = inputs_of(model)[0].requires_grad_()
    found = []
    for plain in (True, False):
        torch.manual_seed(0)
        with revify.plain_backward() if plain else torch.enable_grad():
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), list(model.transition.parameters()), allow_unused=True))
    assert any(g is not None and g.any() for g in found[0])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x: m.transition[0].weight.add_(1), "transition: a parameter of"),
        (lambda m, x: x.mul_(2), r"a side input of shape \(2, 6, 4, 5\) was changed in place"),
    ],
)
def test_changes_between_forward_and_backward(change: Callable[[nn.Module, Tensor], object], message: str) -> None:
    model = net()
    x = inputs_of(model)[0]
    output = model.transition(x)
    with torch.no_grad():
        change(model, x)
    with pytest.raises(revify.StreamError, match=message):
        output.sum().backward()


def test_other_tensors_in_the_second_run() -> None:
    class Growing(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.exp() if self.calls == 1 else x.exp().log().exp()

    model = net()
    model.transition[3] = Growing()
    output = model(*inputs_of(model))
    with pytest.raises(revify.ReplayError, match=r"transition saved \d+ tensors for backward in its first run and \d+"):
        output.sum().backward()


def test_call_without_a_tensor() -> None:
    with pytest.raises(revify.StreamError, match="transition was called without a tensor"):
        net().transition("image")
