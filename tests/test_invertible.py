"""Pairs of functions that are each other's inverse, whose inputs are freed and had again, to a stated tolerance."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from asserts import Count, difference, gradients
from ledger import Ledger
from torch import Tensor, nn

import revify
from revify import Invertible, Reversible, is_invertible


class Scale(nn.Module):
    """Multiplies; its saved tensors are its input and its factor."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.linspace(-0.5, 0.5, width))
        self.count = Count()

    def forward(self, x: Tensor) -> Tensor:
        self.count.up()
        return x * self.logs.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.logs.exp()


class Stretch(nn.Module):
    """A nonlinear function that saves its output as well."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sinh()

    def inverse(self, y: Tensor) -> Tensor:
        return y.asinh()


class Rotation(nn.Module):
    """An orthogonal 1×1 mixing, as Glow has it, kept orthogonal by its parametrisation."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.mix = nn.utils.parametrizations.orthogonal(nn.Linear(width, width, bias=False, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mix.weight

    def inverse(self, y: Tensor) -> Tensor:
        return y @ self.mix.weight.T


class Parts(nn.Module):
    """One tensor → two; undone by joining them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., :2].clone(), x[..., 2:].clone()

    def inverse(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], -1)


class Join(Parts):
    """Two tensors → one."""

    forward, inverse = Parts.inverse, Parts.forward


def chain(depth: int = 4, wrap=Invertible) -> nn.Sequential:
    torch.manual_seed(0)
    kinds = [Scale, Rotation, Stretch]
    return nn.Sequential(*(wrap(kinds[k % 3]()) for k in range(depth))).double()


def outcome(model: nn.Module, x: Tensor, *, plain: bool, work=None) -> dict[str, Tensor]:
    model.zero_grad()
    given = x.clone().requires_grad_()
    torch.manual_seed(1)
    with revify.plain_backward() if plain else contextlib.nullcontext():
        if work is not None:
            work(model, given)
        else:
            y = model(given)
            (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    return {"input": given.grad, **gradients(model)}


def assert_near(model: nn.Module, x: Tensor, tolerance: float, work=None) -> None:
    """Gradients as in ordinary autograd but for the rounding errors of what was had again."""
    expected, found = (outcome(model, x, plain=plain, work=work) for plain in (True, False))
    assert expected.keys() == found.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0.1
    for name, value in expected.items():
        assert difference(found[name], value) <= tolerance * scale, name


def rows(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*(shape or (5, 6)))


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_gradients_are_those_of_ordinary_autograd_to_rounding(depth: int) -> None:
    assert_near(chain(depth), rows().double() / 2, 1e-11)
    assert_near(chain(depth).float(), rows() / 2, 1e-4)


def test_functions_methods_and_modules() -> None:
    owner = Scale()
    for pair in (
        Invertible(owner.forward, owner.inverse),
        Invertible(owner),
        Invertible(owner, owner.inverse),
        Invertible(lambda x: owner(x), lambda y: owner.inverse(y)),
    ):
        names = {name.split(".")[-1] for name, _ in pair.named_parameters()}
        assert names == ({"logs"} if list(pair.children()) else set())
    assert_near(nn.Sequential(Invertible(torch.sinh, torch.asinh), Scale()), rows(), 1e-5)
    two = Invertible(nn.Linear(6, 6), Scale())
    assert [name for name, _ in two.named_children()] == ["function", "undoing"]


def test_one_tensor_becomes_two_and_two_become_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.join, self.scale = Invertible(Parts()), Invertible(Join()), Invertible(Scale())
            self.left = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.parts(self.scale(x))
            return self.join(self.left(a), b)

    assert_near(Net().double(), rows().double(), 1e-12)


def test_the_inverse_has_gradients_and_stores_nothing_either() -> None:
    model = chain(3)

    def back(model: nn.Module, y: Tensor) -> None:
        for module in reversed(model):
            y = module.inverse(y)
        y.square().sum().backward()

    assert_near(model.double(), rows().double() / 2, 1e-11, back)


def test_the_input_is_freed() -> None:
    model, seen = chain(3), []
    for module in model:
        module.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    x = rows()
    y = model(x.double())
    gc.collect()
    assert [value() for value in seen] == [None] * 3
    y.sum().backward()


@pytest.mark.parametrize("inverse", [False, True])
def test_memory_does_not_grow_with_depth(inverse: bool) -> None:
    def held(depth: int) -> tuple[int, int]:
        model = nn.Sequential(*(Invertible(Scale(60)) for _ in range(depth)))
        for parameter in model.parameters():
            parameter.data.zero_()
        x = torch.randn(200, 60)
        with Ledger() as ledger:
            y = x
            for module in reversed(model) if inverse else model:
                y = module.inverse(y) if inverse else module(y)
            loss = y.sum()
            between, ledger.most = ledger.alive(), 0
            loss.backward()
        return between, ledger.most

    few, many = held(3), held(9)
    sketches = 6 * (2 * 257 * 4 + 1000)
    assert many[0] - few[0] <= sketches
    assert many[1] - few[1] <= sketches + 6 * 60 * 8  # and the gradients of the factors


@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_inverse_is_an_error(place: int) -> None:
    model = nn.Sequential(Invertible(Scale()), Invertible(Scale(), lambda y: y * 1.001))
    with pytest.raises(revify.ReplayError, match=r"Scale: what its inverse gave back .* tolerance=0.0001.*discard"):
        (model if place else model[::-1])(rows()).sum().backward()


def test_an_inverse_that_is_wrong_in_one_of_many_values_is_an_error() -> None:
    def nearly(y: Tensor) -> Tensor:
        x = y.asinh()
        x[7, 77] += 1
        return x

    model = Invertible(torch.sinh, nearly)
    with pytest.raises(revify.ReplayError, match="off by"):
        model(rows(20, 500).requires_grad_()).sum().backward()


def test_the_user_states_the_tolerance() -> None:
    x = rows().requires_grad_()
    Invertible(torch.sinh, lambda y: y.asinh() * 1.001, tolerance=0.01)(x).sum().backward()
    with pytest.raises(revify.ReplayError, match=r"tolerance=0\.0005"):
        Invertible(torch.sinh, lambda y: y.asinh() * 1.001, tolerance=5e-4)(x).sum().backward()


class Noisy(Scale):
    """Draws random numbers, others in its second run if nobody repeats them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y - torch.rand_like(y))


def test_random_numbers_are_those_of_the_first_run() -> None:
    torch.manual_seed(5)
    assert_near(nn.Sequential(Invertible(Noisy()), Scale()).double(), rows().double(), 1e-11)
    state = torch.get_rng_state()
    model = Invertible(Noisy())
    y = model(rows())
    drawn = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(drawn, torch.get_rng_state())
    assert not torch.equal(drawn, state)


class Centred(nn.Module):
    """BatchNorm with an inverse: in training mode it undoes what it did last."""

    def __init__(self) -> None:
        super().__init__()
        self.F = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a + self.F(b), b], -1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat([a - self.F(b), b], -1)


def test_buffers_are_updated_once() -> None:
    model = Invertible(Centred()).double()
    model(rows().double()).square().sum().backward()
    assert model.function.F.num_batches_tracked == 1


def test_an_output_of_the_middle_and_a_second_consumer() -> None:
    def middle(model: nn.Module, x: Tensor) -> None:
        y = model[0](x)
        z, other = model[1](y), model[2](y)
        aux = y.square().sum() + other.square().sum()
        aux.backward(retain_graph=True)
        z.square().sum().backward()

    assert_near(chain(3), rows().double() / 2, 1e-11, middle)


def test_a_second_backward_and_a_second_order() -> None:
    def twice(model: nn.Module, x: Tensor) -> None:
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    def slope(model: nn.Module, x: Tensor) -> None:
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()

    for work in (twice, slope):
        assert_near(chain(4), rows().double() / 2, 1e-10, work)


def test_two_passes_before_their_backwards() -> None:
    def both(model: nn.Module, x: Tensor) -> None:
        one, two = model(x), model(x / 2)
        (one.sum() + two.square().sum()).backward()

    assert_near(chain(4), rows().double() / 2, 1e-11, both)


def test_full_backward_hooks_and_frozen_parts() -> None:
    model, fired = chain(3), []
    model[1].requires_grad_(False)
    for module in model:
        module.register_full_backward_hook(lambda module, into, out: fired.append(out[0].clone()))
    assert_near(model, rows().double() / 2, 1e-11)
    assert len(fired) == 6
    for plain, found in zip(fired[:3], fired[3:], strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


def test_side_inputs_go_to_both_functions_and_have_gradients() -> None:
    shift = torch.linspace(0, 1, 6).double().requires_grad_()
    model = Invertible(lambda x, by: (x + by) * by.exp(), lambda y, by: y / by.exp() - by)
    found = []
    for plain in (True, False):
        x = rows().double().requires_grad_()
        with revify.plain_backward() if plain else contextlib.nullcontext():
            found.append(torch.autograd.grad(model(x, by=shift).square().sum(), (x, shift)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_output_changed_in_place_is_an_error() -> None:
    y = Invertible(torch.sinh, torch.asinh)(rows().requires_grad_())
    y.mul_(2)
    with pytest.raises(revify.StreamError, match="changed in place"):
        y.sum().backward()
    with pytest.raises(revify.StreamError, match="changes its input in place"):
        Invertible(lambda x: x.mul_(2), lambda y: y / 2)(rows().requires_grad_() * 1)


def test_without_gradients_the_function_is_only_called() -> None:
    model = Invertible(Scale())
    with torch.no_grad():
        y = model(rows())
    assert torch.equal(y, model.function(rows()))
    assert not hasattr(y, "revify_call")


def test_values_that_are_not_finite_flow() -> None:
    x = rows()
    x[0, 0] = float("inf")
    x.requires_grad_()
    Invertible(Scale())(x).sum().backward()
    assert x.grad.isfinite().all()


def test_under_autocast() -> None:
    net = nn.Linear(3, 3, bias=False)
    model = Invertible(lambda a, b: (a + net(b), b), lambda a, b: (a - net(b), b), tolerance=0.01)
    found = []
    for plain in (True, False):
        net.zero_grad()
        with revify.plain_backward() if plain else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16):
                a, b = model(*(part.requires_grad_() for part in rows().chunk(2, -1)))
            (a.float() * b).square().sum().backward()
        found.append(net.weight.grad.clone())
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()  # one bf16 rounding of the sum


def test_a_reversible_block_and_copies() -> None:
    torch.manual_seed(0)
    block = Reversible(nn.Linear(3, 3), nn.Tanh(), dim=-1, grid=20)
    model = nn.Sequential(Invertible(block), Invertible(Scale()))
    assert_near(model, rows(), 1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(rows()), model(rows()))
        assert other[1].undoing.__self__ is other[1].function


def test_each_function_runs_twice() -> None:
    model = chain(4)
    model(rows().double() / 2).sum().backward()
    assert [module.function.count.number for module in model if isinstance(module.function, Scale)] == [2, 2]


def test_nothing_holds_itself() -> None:
    model, refs = chain(3), []
    gc.disable()
    try:
        y = model(rows().double())
        refs.append(weakref.ref(y.revify_call.call))
        y.sum().backward()
        del y
        assert refs[0]() is None
    finally:
        gc.enable()


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(revify.RevifyError, match=r"Linear has no inverse. Give it a method"):
        Invertible(nn.Linear(3, 3))
    with pytest.raises(revify.RevifyError, match="tolerance is 0"):
        Invertible(Scale(), tolerance=0)
    with pytest.raises(revify.RevifyError, match="expected one or several tensors, got str"):
        Invertible(Scale())("x")
    with pytest.raises(revify.StreamError, match="<lambda> gave float"):
        Invertible(lambda x: 1.0, lambda y: y)(rows().requires_grad_())
    with pytest.raises(revify.StreamError, match="gave 2 tensors, but 1 went in"):
        Invertible(torch.sinh, lambda y: (y, y))(rows().requires_grad_()).sum().backward()


def test_is_invertible_tells_and_leaves_everything_as_it_was() -> None:
    state = torch.get_rng_state()
    centred = Centred()
    assert is_invertible(centred, (5, 6))
    assert centred.F.num_batches_tracked == 0
    assert torch.equal(state, torch.get_rng_state())
    assert is_invertible(Join(), (3, 2), (3, 4))
    assert is_invertible(Join(), ((3, 2), (3, 4)))
    assert not is_invertible(nn.Linear(6, 6), (5, 6))
    assert not is_invertible(Invertible(Scale(), lambda y: y), (5, 6))
    assert is_invertible(Scale().double(), (5, 6), dtype=torch.float64, tolerance=1e-14)
