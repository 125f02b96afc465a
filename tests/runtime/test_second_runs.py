"""A second run uses what was there at the first: whatever a module changes when it runs, and whatever changes afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from asserts import Outcome, assert_same, gradients
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import revify

# Modules that change something when they run


class MovingNorm(nn.Module):
    """Divides by a moving average that it reads and updates in the same forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().abs().mean((0, 2, 3))[:, None, None])
        return x / self.mean


class ReboundNorm(MovingNorm):
    """The same, with another tensor in the buffer's place."""

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().abs().mean((0, 2, 3))[:, None, None]
        return x / self.mean


class SmallMovingNorm(MovingNorm):
    """What differs stays below a step of the grid."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-5 * super().forward(x).square()


class Codebook(nn.Module):
    """A vector quantiser whose codebook follows the data, written through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.permute(0, 2, 3, 1).reshape(-1, 6)
        nearest = torch.cdist(flat, self.codes.weight).argmin(1)
        found = self.codes(nearest)
        if self.training:
            moved = self.codes.weight.detach().clone().index_add_(0, nearest, 0.1 * (flat - found).detach())
            self.codes.weight.data.copy_(moved)
        found = found.view(x.shape[0], *x.shape[2:], 6).permute(0, 3, 1, 2)
        return x + (found - x).detach() * 0.5 + 0.1 * found * x


class DataDependent(nn.Module):
    """ActNorm: the first batch sets the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.ready = nn.Parameter(torch.ones(6, 1, 1)), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.scale.copy_(1 / x.std((0, 2, 3))[:, None, None])
            self.ready = True
        return x * self.scale


class Counting(nn.Module):
    """Plain attributes: a number, a list, a tensor that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.state = 0, [], torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.state += 0.5
        return x * (1 + 0.1 * self.calls) + x.square() * len(self.seen) * self.state


class OwnGenerator(nn.Module):
    """Noise of a generator of its own, far below a step of the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def __deepcopy__(self, memo: dict[int, object]) -> OwnGenerator:
        return OwnGenerator()

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-6 * (x * torch.rand(x.shape, generator=self.generator)).exp()


class Leaky(nn.Module):
    """A spiking neuron: its potential goes from call to call."""

    potential: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.potential = 0.5 * self.potential + x
        return torch.sigmoid(self.potential) * x


def older_spectral_norm() -> nn.Module:
    return spectral_norm(nn.Conv2d(6, 6, 1))


def newer_spectral_norm() -> nn.Module:
    return parametrizations.spectral_norm(nn.Conv2d(6, 6, 1))


CHANGING = (
    MovingNorm,
    ReboundNorm,
    SmallMovingNorm,
    Codebook,
    DataDependent,
    Counting,
    OwnGenerator,
    older_spectral_norm,
    newer_spectral_norm,
)


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.one, self.inner, self.two = nn.Conv2d(6, 6, 3, padding=1), inner, nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.two(F.gelu(self.inner(self.one(x))))


class Stem(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.conv, self.inner, self.last = nn.Conv2d(3, 6, 3, padding=1), inner, nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.inner(self.conv(x))))


class Network(nn.Module):
    """A stem and four blocks, with something in the stem or in the third block."""

    def __init__(self, inner: Callable[[], nn.Module], place: str) -> None:
        super().__init__()
        self.stem = Stem(inner() if place == "outside" else nn.Identity())
        self.blocks = nn.Sequential(
            *(Block(inner() if place == "inside" and n == 2 else nn.Identity()) for n in range(4))
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def network(inner: Callable[[], nn.Module] = nn.Identity, place: str = "inside", **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = revify.convert(Network(inner, place), images(), **options)
    if place == "outside":
        assert any("stem" in path for c in model.revify_plan.checkpointed for path in c.paths)
    return model


def outcome(model: nn.Module, train: Callable[[nn.Module], None], *, plain: bool) -> Outcome:
    """What training leaves in a copy of the model: gradients, parameters, buffers, plain numbers."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    with revify.plain_backward() if plain else nullcontext():
        train(model)
    found = gradients(model) | {f"state {n}": value.detach().clone() for n, value in model.state_dict().items()}
    calls = [(n, part) for n, part in model.named_modules() if isinstance(part, Counting)]
    return found | {f"{n} calls": torch.tensor([p.calls, len(p.seen), p.state.item()]) for n, p in calls}


def assert_equal(model: nn.Module, train: Callable[[nn.Module], None]) -> None:
    expected = outcome(model, train, plain=True)
    assert any(name.startswith("grad") for name in expected)
    assert_same(outcome(model, train, plain=False), expected)


def three_steps(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for seed in range(3):
        optimizer.zero_grad()
        model(images(seed)).square().sum().backward()
        optimizer.step()


def two_forwards(model: nn.Module) -> None:
    one, two = model(images(1)), model(images(2))
    (one * two).sum().backward()


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("inner", CHANGING)
def test_what_the_first_run_changed_is_as_it_was_and_stays_changed_once(
    inner: Callable[[], nn.Module], place: str
) -> None:
    assert_equal(network(inner, place), three_steps)


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("inner", [ReboundNorm, Codebook, older_spectral_norm, newer_spectral_norm])
def test_two_forwards_before_one_backward(inner: Callable[[], nn.Module], place: str) -> None:
    assert_equal(network(inner, place), two_forwards)


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_a_potential_that_goes_from_call_to_call(place: str) -> None:
    def train(model: nn.Module) -> None:
        for part in model.modules():
            part.potential = 0.0
        (model(images(1)) + model(images(2)) * model(images(3))).sum().backward()

    assert_equal(network(Leaky, place), train)


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_a_change_that_comes_late_is_an_error_once(place: str) -> None:
    """Large weights are copied only where a module is known to change them."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.late = nn.Conv2d(6, 6, 15, padding=7), False

        def forward(self, x: Tensor) -> Tensor:
            if self.late:
                with torch.no_grad():
                    self.wide.weight.mul_(0.9)
            return self.wide(x)

    model = network(Late, place)
    three_steps(model)
    for part in model.modules():
        part.late = True
    with pytest.raises(revify.ReplayError, match=r"changed a parameter of shape .* which it had not done"):
        three_steps(model)
    expected = copy.deepcopy(model)
    three_steps(model)
    with revify.plain_backward():
        three_steps(expected)
    assert_same(gradients(model), gradients(expected))


# What happens between forward and backward


def between(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def train(model: nn.Module) -> None:
        loss = model(images()).square().sum()
        change(model)
        loss.backward()

    return train


def set_eps(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 5.0


def replace_layers(model: nn.Module) -> None:
    model.stem.last = nn.Conv2d(6, 6, 1)
    model.blocks[1].one = nn.Conv2d(6, 6, 3, padding=1)


def add_hooks(model: nn.Module) -> None:
    for part in (model.stem.conv, model.blocks[1].one):
        part.register_forward_hook(lambda module, args, output: output * 2)


def rebind_buffers(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.full((6,), 3.0)


def norms() -> nn.Module:
    return nn.BatchNorm2d(6)


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize(
    "change",
    [
        set_eps,
        replace_layers,
        add_hooks,
        rebind_buffers,
        lambda m: m.eval(),
        lambda m: m.requires_grad_(False),
        lambda m: m.load_state_dict({n: torch.randn_like(v.float()) for n, v in m.state_dict().items()}, assign=True),
    ],
    ids=["eps", "layers", "hooks", "buffers", "modes", "frozen", "assign"],
)
def test_what_is_exchanged_after_the_forward_is_not_used(change: Callable[[nn.Module], object], place: str) -> None:
    model = network(norms, place)

    def kept(model: nn.Module) -> None:
        parameters = list(model.parameters())
        between(change)(model)
        for number, parameter in enumerate(parameters):
            model.register_parameter(f"kept{number}", parameter)

    found, expected = (
        {n: v for n, v in outcome(model, kept, plain=plain).items() if n.startswith("grad")} for plain in (False, True)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_thawed_before_the_backward(place: str) -> None:
    def train(model: nn.Module) -> None:
        model.blocks.requires_grad_(False)
        model.stem.last.requires_grad_(False)
        between(lambda m: m.requires_grad_(True))(model)

    assert_equal(network(norms, place), train)


def double_weights(model: nn.Module) -> None:
    for part in (model.stem.conv, model.blocks[1].one):
        part.weight.data.mul_(2)


def other_weights(model: nn.Module) -> None:
    for part in (model.stem.conv, model.blocks[1].one):
        part.weight.data = torch.randn_like(part.weight)


@pytest.mark.parametrize("change", [double_weights, other_weights])
def test_weights_written_past_autograd_are_an_error(change: Callable[[nn.Module], None]) -> None:
    with pytest.raises(revify.ReplayError, match="when it was run again"):
        outcome(network(norms), between(change), plain=False)


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("inside", [True, False])
def test_fast_weights(place: str, inside: bool) -> None:
    """MAML: weights that are functions of weights, put in for one call."""

    def train(model: nn.Module) -> None:
        own = {n: p for n, p in model.named_parameters() if inside or n.startswith("stem")}
        loss = torch.func.functional_call(model, own, (images(),)).square().mean()
        steps = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        fast = {n: p - 0.5 * step for (n, p), step in zip(own.items(), steps, strict=True)}
        torch.func.functional_call(model, fast, (images(1),)).square().mean().backward()

    assert_equal(network(norms, place), train)


# Conditions of the first run


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2).transpose(1, 2)[:, None].repeat(1, 2, 1, 3)
        return x + F.scaled_dot_product_attention(flat, flat, flat)[:, 0, :, :6].transpose(1, 2).reshape(x.shape)


class MakesTensors(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rand(x.shape).round()).to(x.dtype).square() + x * torch.tensor(0.1).to(x.dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize(
    ("inner", "condition"),
    [
        (Attention, lambda: sdpa_kernel(SDPBackend.MATH)),
        (MakesTensors, lambda: default_dtype(torch.float64)),
        (MakesTensors, lambda: torch.autocast("cpu", torch.bfloat16)),
        (nn.Identity, lambda: torch.backends.mkldnn.flags(enabled=False)),
        (nn.Identity, lambda: torch.backends.mkldnn.flags(enabled=True, deterministic=True)),
    ],
    ids=["attention kernels", "default dtype", "autocast", "mkldnn", "deterministic"],
)
def test_conditions_of_the_forward_only(
    inner: Callable[[], nn.Module], condition: Callable[[], AbstractContextManager[None]], place: str
) -> None:
    def train(model: nn.Module) -> None:
        with condition():
            loss = model(images()).square().sum()
        loss.backward()

    assert_equal(network(inner, place), train)


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("backward_within", [True, False])
def test_weights_of_a_parametrization_that_are_cached(backward_within: bool, place: str) -> None:
    def train(model: nn.Module) -> None:
        with parametrize.cached():
            loss = model(images()).square().sum() + model(images(1)).sum()
            if backward_within:
                loss.backward()
        if not backward_within:
            loss.backward()

    assert_equal(network(lambda: parametrizations.weight_norm(nn.Conv2d(6, 6, 1)), place), train)


def test_settings_are_put_back_after_an_error_in_the_second_run() -> None:
    failing: list[bool] = []

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if failing:
                raise MemoryError
            return x.exp()

    model = network(Fails)
    with default_dtype(torch.float64):
        loss = model(images()).sum()
    failing.append(True)
    before = [vars(part) for part in model.modules()]
    with pytest.raises(MemoryError):
        loss.backward()
    assert torch.get_default_dtype() == torch.float32
    assert all(vars(part) is kept for part, kept in zip(model.modules(), before, strict=True))


# What does not repeat


class Moody(nn.Module):
    """Repeats itself while the model is converted, or planning would have left it out."""

    moody = False


class Side(Moody):
    """An auxiliary loss with noise that does not repeat, left as an attribute."""

    loss: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        self.loss = (self.route(pooled) * (random.random() if self.moody else 1)).square().sum()
        return x


class Noise(Moody):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-6 * (x * (random.random() if self.moody else 1)).exp()


class Flips(Moody):
    """A kernel that does not repeat itself in all bits: two opposite steps of one unit in the last place."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        if not self.moody:
            return y
        bits = y.detach().view(-1).view(torch.int32)
        one, two = random.sample(range(bits.numel()), 2)
        bits[one] += 1
        bits[two] -= 1
        return y


def moody(model: nn.Module) -> nn.Module:
    for part in model.modules():
        part.moody = True
    return model


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("inner", [Side, Noise])
def test_what_does_not_repeat_itself_and_does_not_show_on_the_grid(inner: type[nn.Module], place: str) -> None:
    model = moody(network(inner, place))
    loss = model(images()).sum()
    loss = loss + sum(part.loss for part in model.modules() if isinstance(part, Side) and part.loss is not None)
    with pytest.raises(revify.ReplayError, match=r"(stem|blocks\.2).* had other values saved .* discard them"):
        loss.backward()


def test_noise_on_a_last_layer() -> None:
    """Outside of the stages the second run ends early, and its last saved tensor is compared as a whole."""
    for _ in range(20):
        model = moody(network(Flips, "outside"))
        loss = model(images()).square().sum()
        with pytest.raises(revify.ReplayError, match="stem"):
            loss.backward()


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_kernels_that_do_not_repeat_may_be_allowed(place: str) -> None:
    """Gradients are then those of second runs that differ by an ulp here and there: 1e-4 is far above their sum."""
    model = moody(network(Flips, place, guard="shapes"))
    model(images()).square().sum().backward()
    found = gradients(model)
    model.zero_grad()
    for part in model.modules():
        part.moody = False
    with revify.plain_backward():
        model(images()).square().sum().backward()
    for name, gradient in gradients(model).items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


def test_other_shapes_are_refused_even_where_bits_are_not_compared() -> None:
    class Shrinks(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return x + x[:1].exp().mean() if self.calls > 6 else x + x.exp().mean()

    model = network(Shrinks, "inside", guard="shapes")
    Shrinks.calls = 6
    loss = model(images()).sum()
    Shrinks.calls = 0
    with pytest.raises(revify.ReplayError, match="saved"):
        loss.backward()


def test_a_recurrence_compares_bits() -> None:
    with pytest.raises(revify.RevifyError, match='guard="shapes" is for coded steps'):
        revify.Method(guard="shapes", step="recurrence")
