"""What MemCNN's own test suite asks of its library (129 cases), asked of revify in our words.

MemCNN's names and what stands for them here: InvertibleModuleWrapper → `Invertible`; AdditiveCoupling → `Reversible`;
AffineCoupling with its first adapter → `Reversible(…, coupling=exponential)`, with its sigmoid adapter →
`Reversible(EvenOdd(…), coupling=glow)`; is_invertible_module → `is_invertible`; keep_input=True or disable → `with
plain_backward():`. What is freed differs on purpose: MemCNN empties the storage of the caller's own tensor, which is
then silently wrong for everybody else who uses it; here nothing holds on to it. One grid passes all of them: grid=32, whose
streams are held in float64, has the callers' tolerances of 1e-6 and any range (grid=20 ends at 16, the stack of five at 64).
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from asserts import assert_same, gradients
from torch import Tensor, nn

import revify
from revify import Invertible, Reversible, ReversibleSequence, is_invertible
from revify.couplings import EvenOdd, additive, exponential, glow

GRID = 32


class ConvNorm(nn.Module):
    """A branch with a norm in training mode; it notes its activations."""

    def __init__(self, width: int = 5, out: int | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, out or width, 3, padding=1), nn.BatchNorm2d(out or width)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.seen.append(weakref.ref(y))
        return self.norm(y)


class Multiply(nn.Module):
    """One factor for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 1
        self.seen.append(weakref.ref(kept))
        return kept * self.factor

    def inverse(self, y: Tensor) -> Tensor:
        kept = y * 1
        self.seen.append(weakref.ref(kept))
        return kept / self.factor


def block(coupling=additive, *branches: nn.Module, grid: int = GRID) -> Reversible:
    return Reversible(*branches, coupling=coupling, grid=grid)


def glow_block() -> Reversible:
    return block(glow, EvenOdd(ConvNorm(5, 10)))


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "additive": lambda: block(additive, ConvNorm()),
    "affine": lambda: block(exponential, ConvNorm()),
    "sigmoid": glow_block,
    "multiply": Multiply,
}


def seen_by(model: nn.Module) -> list[weakref.ref[Tensor]]:
    return [ref for module in model.modules() for ref in getattr(module, "seen", [])]


def step(model: nn.Module, lr: float = 0.1) -> None:
    torch.optim.SGD(model.parameters(), lr).step()


def plainly(wanted: bool) -> contextlib.AbstractContextManager[None]:
    return revify.plain_backward() if wanted else contextlib.nullcontext()


# Couplings against formulas written out (12)


def written_out(coupling: object, F: nn.Module, G: nn.Module, x: Tensor, *, inverse: bool) -> Tensor:
    """The coupling, or its inverse, in plain PyTorch."""
    a, b = x.chunk(2, 1)
    scale = torch.exp if coupling is exponential else torch.ones_like
    if inverse:
        t = G(a)
        b = (b - t) / scale(t)
        t = F(b)
        a = (a - t) / scale(t)
    else:
        t = F(b)
        a = a * scale(t) + t
        t = G(a)
        b = b * scale(t) + t
    return torch.cat([a, b], 1)


@pytest.mark.parametrize("coupling", [additive, exponential], ids=lambda c: c.__name__)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("form", ["block", "sequence", "wrapped"])
def test_one_step_of_training_is_that_of_the_formula_written_out(coupling, inverse: bool, form: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.rand(2, 4, 5, 5)
        F, G = (nn.Conv2d(2, 2, 3, padding=1) for _ in "FG")
        own = block(coupling, copy.deepcopy(F), copy.deepcopy(G))
        model = {"block": own, "sequence": ReversibleSequence([own]), "wrapped": Invertible(own)}[form]
        given = x.clone().requires_grad_()
        loss = (model.inverse(given) if inverse else model(given)).mean()
        weights = [own.F.weight, own.F.bias, own.G.weight, own.G.bias]
        by_hand = torch.autograd.grad(loss, [given, *weights], retain_graph=True)
        loss.backward()
        assert all(map(torch.equal, by_hand, [given.grad, *(w.grad for w in weights)]))
        step(own)
        plain = nn.ModuleDict({"F": F, "G": G})
        written_out(coupling, F, G, x, inverse=inverse).mean().backward()
        before = F.weight.clone()
        step(plain)
        assert not torch.equal(F.weight, before)
        for ours, theirs in zip(weights, [F.weight, F.bias, G.weight, G.bias], strict=True):
            torch.testing.assert_close(ours, theirs)  # its own tolerances: the streams are rounded to 2^-20
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        (model.inverse(given) if inverse else model(given)).mean().backward()
        assert torch.equal(given, x)


# One branch given (2)


@pytest.mark.parametrize("coupling", [additive, exponential], ids=lambda c: c.__name__)
def test_the_second_branch_is_a_copy_of_the_first(coupling) -> None:
    made = block(coupling, ConvNorm())
    assert_same(made.F.state_dict(), made.G.state_dict())
    assert made.F.conv.weight is not made.G.conv.weight


# is_invertible (14)


class Pass(nn.Module):
    """Hands on its input, multiplied or not, which a parameter decides."""

    def __init__(self, *, forward: bool = False, inverse: bool = False) -> None:
        super().__init__()
        self.factor, self.ways = nn.Parameter(torch.ones(1)), (forward, inverse)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor if self.ways[0] else x

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.factor if self.ways[1] else y


class Twice(nn.Module):
    """One tensor handed out twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * x
        return y, y

    def inverse(self, y: Tensor, same: Tensor) -> Tensor:
        return torch.maximum(y.sqrt(), same.sqrt())


class NoInverse(nn.Module):
    """Its inverse undoes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 4

    def inverse(self, y: Tensor) -> Tensor:
        return y * 8


def test_an_inverse_that_loses_everything_is_none() -> None:
    lost = Pass(inverse=True)
    nn.init.zeros_(lost.factor)
    assert not is_invertible(lost, (12, 12))


@pytest.mark.parametrize("seed", [1, 42, 900000])
def test_the_answer_does_not_depend_on_the_seed(seed: int) -> None:
    assert is_invertible(Pass(forward=True, inverse=True), (1,), seed=seed)


def test_one_tensor_may_be_handed_out_twice() -> None:
    assert is_invertible(Twice(), (1, 2, 5, 5), draw=torch.rand, tolerance=1e-6)  # x ≥ 0, where the square has a root
    assert not is_invertible(Twice(), (1, 2, 5, 5))
    x = torch.rand(1, 2, 5, 5).requires_grad_()
    a, b = Invertible(Twice())(x)
    (a + 2 * b).sum().backward()
    torch.testing.assert_close(x.grad, 6 * x.detach())


def test_a_function_may_hand_on_its_input() -> None:
    x = torch.rand(1, 2, 5, 5).requires_grad_()
    for forward, inverse in ((False, False), (True, False), (True, True)):
        passed = Pass(forward=forward, inverse=inverse)
        assert is_invertible(passed, x.shape, tolerance=1e-6)
        wrapped = Invertible(passed)
        x.grad = None
        wrapped.inverse(wrapped(x)).sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))
        assert x.numel() == 50


@pytest.mark.parametrize("wrap", [False, True])
def test_what_is_invertible_and_what_is_not(wrap: bool) -> None:
    shape = (2, 10, 10, 10)
    wrapper = Invertible if wrap else (lambda module: module)
    assert is_invertible(wrapper(block(additive, ConvNorm())), shape)
    assert not is_invertible(wrapper(NoInverse()), shape)
    if wrap:
        with pytest.raises(revify.RevifyError, match="Conv2d has no inverse"):
            wrapper(nn.Conv2d(10, 10, 1))
    else:
        assert not is_invertible(nn.Conv2d(10, 10, 1), shape)


@pytest.mark.parametrize("shape", ["string", (2.3, 1.4), None, True, ((1, 3), 12.4), ((1, 3), False)])
def test_what_is_no_shape_is_refused(shape: object) -> None:
    with pytest.raises(revify.RevifyError, match=r"is_invertible: .* no shape"):
        is_invertible(Pass(forward=True, inverse=True), shape)


# One tensor and several (2)


class Cut(nn.Module):
    """Channels → two tensors; joined again."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :2].clone(), x[:, 2:].clone()

    def inverse(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 1)


class Joined(Cut):
    """The other way round."""

    forward, inverse = Cut.inverse, Cut.forward


@pytest.mark.parametrize("plain", [True, False])
def test_tensors_are_parted_and_joined(plain: bool) -> None:
    part, join = Invertible(Cut()), Invertible(Joined())
    assert is_invertible(part, (1, 3, 32, 32))
    assert is_invertible(join, ((1, 2, 32, 32), (1, 1, 32, 32)))
    x = torch.rand(1, 3, 32, 32).requires_grad_()
    with plainly(plain):
        a, b = part(x)
        join(nn.Conv2d(2, 2, 3)(a), nn.Conv2d(1, 1, 3)(b)).sum().backward()
    assert x.grad.abs().sum() > 0


# Networks of such blocks (4)


def norm_first(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), *layers)


BASIC = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
BOTTLENECK = [nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1)]


@pytest.mark.parametrize("layers", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
@pytest.mark.parametrize("alone", [False, True])
def test_networks_in_evaluation(layers: list[nn.Module], alone: bool) -> None:
    def make() -> Reversible:
        return Reversible(norm_first(*copy.deepcopy(layers)))

    body = nn.Sequential(make(), make()) if alone else ReversibleSequence([make(), make()])
    net = nn.Sequential(nn.Conv2d(3, 16, 3), body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        assert net(torch.ones(2, 3, 32, 32)).isfinite().all()


# Random numbers (2)


@pytest.mark.parametrize("repeated", [True, False])
def test_a_second_run_draws_the_numbers_of_the_first_and_no_others(repeated: bool) -> None:
    torch.manual_seed(0)
    model = Reversible(nn.Dropout(0.5), nn.Dropout(0.5))
    x = torch.ones(1, 2, 10, 10).requires_grad_()
    y = model(x)
    if not repeated:
        torch.rand(7)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(0)
    with revify.plain_backward():
        (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(x.grad, expected)


# What there is not (2)


@pytest.mark.parametrize("coupling", [additive, exponential], ids=lambda c: c.__name__)
def test_an_unknown_coupling_is_refused(coupling) -> None:
    with pytest.raises(revify.RefusalError, match="unknown"):
        Reversible(nn.Conv2d(10, 10, 3, padding=1), coupling=lambda x1, x2, F: unknown(coupling(x1, x2, F, F)))


def unknown(streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    raise NotImplementedError("unknown")


# Forward, inverse, and a step of training (64)


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("first_inverse", [False, True])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("plain_back", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_there_and_back_and_a_step(kind: str, first_inverse: bool, plain: bool, plain_back: bool, drawn: bool) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        function = WRAPPED[kind]()
        x, target = torch.rand(2, 10, 8, 8), torch.rand(2, 10, 8, 8)
        assert is_invertible(function, x.shape, draw=torch.rand, tolerance=1e-4)
        model = Invertible(function)
        there, back = (model.inverse, model) if first_inverse else (model, model.inverse)
        with plainly(plain):
            y = there(x.clone().requires_grad_())
        assert all((ref() is not None) == plain for ref in seen_by(model))
        earlier = len(seen_by(model))
        with plainly(plain_back):
            again = back(y.detach().clone().requires_grad_())
        assert sum(ref() is not None for ref in seen_by(model)) == earlier * plain + (
            (len(seen_by(model)) - earlier) * plain_back
        )
        if drawn:
            torch.rand(5)
        nn.functional.mse_loss(y, target).backward()
        torch.testing.assert_close(again, x, rtol=0, atol=1e-4)
        before = [p.detach().clone() for p in model.parameters()]
        step(model)
        assert not torch.equal(next(model.parameters()), before[0])
        assert y.shape == x.shape


# Chains (3), both ways at once (1), on and off (2), inverse (2), against ordinary training (2)


@pytest.mark.parametrize("kind", ["additive", "affine", "sigmoid"])
def test_a_chain_of_two_trains(kind: str) -> None:
    torch.manual_seed(42)
    model = nn.Sequential(*(Invertible(WRAPPED[kind]()) for _ in range(2)))
    loss = nn.functional.mse_loss(model(torch.rand(2, 10, 8, 8)), torch.rand(2, 10, 8, 8))
    loss.backward()
    step(model)
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_shared_branch_forwards_and_back_three_times_and_two_losses() -> None:
    torch.manual_seed(42)
    shared = ConvNorm()
    model = ReversibleSequence(block(additive, shared, shared, grid=32) for _ in range(5))
    start = copy.deepcopy(model.state_dict())
    data, target = torch.rand(2, 10, 8, 8), torch.rand(2, 10, 8, 8)
    found: dict[tuple[bool, bool], dict[str, Tensor]] = {}
    for forward in (True, False):
        for plain in (True, False):
            model.load_state_dict(start)
            model.zero_grad()
            x = data.clone().requires_grad_()
            there, back = (model, model.inverse) if forward else (model.inverse, model)
            with plainly(plain):
                y = there(x)
                again = [back(y) for _ in range(3)]
            for one in again:
                torch.testing.assert_close(one, x, rtol=0, atol=1e-4)
            nn.functional.mse_loss(again[0], target).backward(retain_graph=True)
            nn.functional.mse_loss(again[1], target).backward()
            found[forward, plain] = {"x": x.grad, "y": y.detach(), **gradients(model)}
    for forward in (True, False):
        assert_same(found[forward, False], found[forward, True])


@pytest.mark.parametrize("inverse", [False, True])
def test_with_and_without_stored_activations_values_are_the_same(inverse: bool) -> None:
    torch.manual_seed(42)
    shared = ConvNorm()
    model = Invertible(block(additive, shared, shared)).eval()
    x = torch.rand(2, 10, 8, 8)
    outcomes = []
    for plain in (True, False):
        with torch.no_grad(), plainly(plain):
            outcomes.append(model.inverse(x) if inverse else model(x))
    assert torch.equal(*outcomes)
    assert x.untyped_storage().size() > 0  # the caller's tensor is the caller's


@pytest.mark.parametrize("coupling", [additive, exponential], ids=lambda c: c.__name__)
def test_the_inverse_gives_the_input(coupling) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.rand(2, 4, 5, 5).requires_grad_()
        model = Invertible(block(coupling, nn.Conv2d(2, 2, 3, padding=1)))
        torch.testing.assert_close(model.inverse(model(x.clone())), x, rtol=0, atol=2e-6)  # two roundings to 2^-20


@pytest.mark.parametrize("coupling", [additive, exponential], ids=lambda c: c.__name__)
def test_training_is_that_of_the_plain_formula(coupling) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.rand(2, 4, 5, 5)
        F, G = (nn.Conv2d(2, 2, 3, padding=1) for _ in "FG")
        own = block(coupling, copy.deepcopy(F), copy.deepcopy(G))
        plain, given = nn.ModuleDict({"F": F, "G": G}), x.clone().requires_grad_()
        y = Invertible(own)(given)
        y.mean().backward()
        written_out(coupling, F, G, x, inverse=False).mean().backward()
        assert given.is_contiguous()
        assert y.is_contiguous()
        step(own)
        step(plain)
        for (name, ours), theirs in zip(own.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


# Along which axis (16)


class Measured(nn.Module):
    """Says if it is given another size than half of the axis."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.dim, self.size = dim, size

    def forward(self, x: Tensor) -> Tensor:
        assert x.size(self.dim) == self.size
        return x * 0.5


@pytest.mark.parametrize("dim", [None, 0, 1, 2])
@pytest.mark.parametrize("coupling", [additive, exponential], ids=lambda c: c.__name__)
@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 4, 8, 12)])
def test_any_axis_can_be_split(dim: int | None, coupling, shape: tuple[int, ...]) -> None:
    axis = 1 if dim is None else dim
    branch = Measured(axis, shape[axis] // 2)
    model = Reversible(branch, coupling=coupling) if dim is None else Reversible(branch, coupling=coupling, dim=dim)
    assert model(torch.randn(shape)).shape == shape


# The example of the front page (1)


def test_the_smallest_example() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 10, 8, 8)
    branch = ConvNorm()
    model = Invertible(Reversible(branch, grid=GRID)).eval()
    y = model(x)
    torch.testing.assert_close(model.inverse(y), x, rtol=0, atol=1e-6)
