"""Transitions that run again in backward: the same bits, the same manners as the stages."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import zoo
from asserts import Count, assert_same, assert_same_gradients, converted, gradients, inputs_of, run
from ledger import Ledger
from torch import Tensor, nn

import revify

KINDS = (zoo.TwoStages, zoo.LayersInARow)


def net(kind: type[zoo.Net] = zoo.TwoStages, **options: object) -> nn.Module:
    return converted(kind, transitions="checkpoint", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 3])
def test_same_gradients(bits: int, autocast: torch.dtype | None, kind: type[zoo.Net]) -> None:
    model = net(kind, bits=bits)
    found = assert_same_gradients(model, inputs_of(model), autocast=autocast)
    kept = run(converted(kind, bits=bits), inputs_of(model), autocast=autocast)
    assert_same(found, kept)


def test_counts_batches_once() -> None:
    model = net()
    model(*inputs_of(model)).sum().backward()
    assert int(model.transition[1].num_batches_tracked) == 1
    model = net(zoo.LayersInARow)
    model(*inputs_of(model)).sum().backward()
    assert int(model.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_holds_less(kind: type[zoo.Net]) -> None:
    alive = []
    for transitions in ("keep", "checkpoint"):
        model = converted(kind, transitions=transitions, bits=0)
        with Ledger() as ledger:
            output = model(*inputs_of(model))
            alive.append(ledger.alive())
        del output
    assert alive[1] < alive[0]


def test_layers_in_a_row_hold_what_the_first_was_given() -> None:
    model = net(zoo.LayersInARow, bits=0).requires_grad_(True)
    assert next(c.paths for c in model.revify_plan.checkpointed) == ("stem", "norm", "act", "drop", "pool")
    (x,) = inputs_of(model)
    with Ledger() as ledger:
        output = model.pool(model.drop(model.act(model.norm(model.stem(x)))))
        checksums = 8 * 8
        assert ledger.alive() <= output.nbytes + model.norm.num_batches_tracked.nbytes + checksums
    output.sum().backward()


@pytest.mark.parametrize("between", ["operation", "in place", "hook", "alone"])
def test_something_between_layers_in_a_row(between: str) -> None:
    """Then the layers behind it hold what they are given: slower to forget, never wrong."""
    model = net(zoo.LayersInARow, bits=0).eval()
    (x,) = inputs_of(model)

    def forward() -> Tensor:
        y = model.stem(x)
        if between == "operation":
            y = y * 2
        elif between == "in place":
            y.mul_(2)
        elif between == "alone":
            y = x.clone()
        return model.act(model.norm(y)).square().sum()

    if between == "hook":
        model.stem.register_forward_hook(lambda module, args, output: output * 2)
    found = []
    for plain in (True, False):
        model.zero_grad()
        with revify.plain_backward() if plain else torch.enable_grad():
            forward().backward()
        found.append(gradients(model))
    assert found[0]
    assert_same(found[1], found[0])


def test_a_module_whose_input_is_changed_later_is_left_alone() -> None:
    """Ordinary autograd allows it where the module's first operation saves nothing."""

    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class ChangesItLater(zoo.TwoStages):
        def __init__(self) -> None:
            super().__init__()
            self.transition.insert(0, Doubling())

        def forward(self, x: Tensor) -> Tensor:
            x = self.stages[0](self.stem(x)).clone()
            y = self.transition(x)
            x.add_(1)
            return self.head(self.stages[1](y).mean((2, 3))) + x.mean()

    model = net(ChangesItLater)
    assert "transition" not in {path for c in model.revify_plan.checkpointed for path in c.paths}
    assert_same_gradients(model, inputs_of(model))


def test_layers_in_a_row_leave_their_values_as_they_were() -> None:
    """What rides on them does not come along when they are saved or copied."""
    model = net(zoo.LayersInARow, bits=0)
    y = model.stem(*inputs_of(model))
    assert vars(y)["revify_section"]
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert not vars(torch.load(file)).get("revify_section")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retain", [True, False])
def test_two_forwards_and_two_backwards(retain: bool, kind: type[zoo.Net]) -> None:
    model = net(kind, bits=1)
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
        def __init__(self) -> None:
            super().__init__()
            self.count = Count()

        def forward(self, x: Tensor) -> Tensor:
            return x.exp() if self.count.up() == 1 else (x + 1).exp()

    model = net()
    model.transition[3] = Growing()
    output = model(*inputs_of(model))
    with pytest.raises(revify.ReplayError, match="transition had other values saved"):
        output.sum().backward()


def test_call_without_a_tensor() -> None:
    with pytest.raises(revify.StreamError, match="transition was called without a tensor"):
        net().transition("image")
