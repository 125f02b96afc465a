"""Blocks made by hand: the gradients of ordinary autograd, without stored activations, for every coupling."""

from __future__ import annotations

import contextlib
import copy
import pickle
from functools import partial

import formulas
import pytest
import torch
from asserts import Count, assert_same, difference, gradients, run
from ledger import Ledger
from torch import Tensor, nn

import revify
from revify import Reversible, ReversibleSequence
from revify.couplings import ScaleShift, additive, affine, damped, derive, half, single, swapped
from revify.couplings.formulas import Formula

BF16 = torch.bfloat16


def off_the_grid(x1, x2, F, G):
    """Numbers that are no grid values, products of branches, and a sign."""
    y1 = -(x1 + 0.3 * F(x2))
    return y1, 0.7 - x2 - G(y1) / 3


EXACT = [additive, swapped, single, half, damped, partial(damped, gamma=0.125), formulas.leapfrog, off_the_grid]


class Branch(nn.Module):
    """A branch with a norm, dropout, and widths that may differ; it counts its calls."""

    def __init__(self, width: int = 3, out: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 7), nn.Linear(7, out or width)
        self.drop = nn.Dropout(0.2)
        self.count = Count()

    def forward(self, *streams: Tensor) -> Tensor:
        self.count.up()
        mixed = sum(place * x for place, x in enumerate(streams, 1))
        return self.down(self.drop(torch.nn.functional.gelu(self.up(self.norm(mixed)))))


class Several(nn.Module):
    """A branch that gives several values."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Branch() for _ in range(count))

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(*streams) for part in self.parts)


def sequence(formula: Formula, depth: int = 4, **options: int) -> ReversibleSequence:
    torch.manual_seed(0)
    gives = derive(formula).forward.gives.values()
    return ReversibleSequence(
        Reversible(*(Branch() if n == 1 else Several(n) for n in gives), coupling=formula, **{"dim": -1, **options})
        for _ in range(depth)
    )


def tokens(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*(shape or (2, 5, 6)))


def assert_bitwise(model: nn.Module, *inputs: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    expected = run(model, inputs, plain=True, autocast=autocast)
    found = run(model, inputs, autocast=autocast)
    assert sum(bool(g.any()) for n, g in expected.items() if n.startswith("grad")) > 4
    assert_same(found, expected)
    return found


# Gradients


@pytest.mark.parametrize("formula", EXACT)
@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("depth", [1, 5])
def test_exact_couplings_give_the_gradients_of_autograd_bit_for_bit(
    formula: Formula, autocast: torch.dtype | None, depth: int
) -> None:
    assert_bitwise(sequence(formula, depth), tokens(), autocast=autocast)


@pytest.mark.parametrize("dtype", [BF16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    found = assert_bitwise(sequence(damped).to(dtype), tokens().to(dtype))
    assert found["output"].dtype == dtype


def test_sixty_four_blocks() -> None:
    assert_bitwise(sequence(additive, 64), tokens())


def test_couplings_may_differ_from_block_to_block() -> None:
    couplings = [additive, single, damped, swapped, half, additive]
    model = ReversibleSequence(block for formula in couplings for block in sequence(formula, 1))
    assert_bitwise(model, tokens())


@pytest.mark.parametrize("formula", [*formulas.DERIVED, formulas.rotation], ids=lambda formula: formula.__name__)
def test_every_coupling_is_near_autograd_in_float64(formula: Formula) -> None:
    model = sequence(formula, 3).double()
    count = len(derive(formula).forward.inputs)
    streams = tokens(count, 2, 5, 3).double().unbind()
    weights = tokens(count, 2, 5, 3).double().square().unbind()
    outcomes = []
    for plain in (True, False):
        given = [x.clone().requires_grad_() for x in streams]
        torch.manual_seed(3)
        with revify.plain_backward() if plain else contextlib.nullcontext():
            outputs = model(tuple(given))
            loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
            wanted = [*given, *model.parameters()]
            outcomes.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    scale = max(float(g.abs().max()) for g in outcomes[0] if g is not None)
    assert scale > 0.1
    for found, expected in zip(outcomes[1], outcomes[0], strict=True):
        assert (found is None) == (expected is None)
        assert found is None or difference(found, expected) <= 1e-12 * scale


def affine_sequence(depth: int) -> ReversibleSequence:
    torch.manual_seed(0)
    model = ReversibleSequence(
        Reversible(ScaleShift(Branch(), 3, -1), ScaleShift(Branch(), 3, -1), coupling=affine, dim=-1)
        for _ in range(depth)
    )
    for name, weight in model.named_parameters():
        if name.endswith("G.weight") or name.endswith("F.weight"):
            nn.init.uniform_(weight, -0.5, 0.5)
    return model


@pytest.mark.parametrize("depth", [2, 32])
def test_affine_couplings_drift_little_in_float32(depth: int) -> None:
    model, x = affine_sequence(depth), [tokens()]
    expected, found = run(model, x, plain=True), run(model, x)
    scale = max(float(g.abs().max()) for n, g in expected.items() if n.startswith("grad"))
    off = max(difference(found[n], expected[n]) for n in expected)
    assert 0 < off <= 1e-5 * scale


def test_a_drift_that_spoils_the_gradients_is_an_error() -> None:
    def contracting(x1, x2, F):
        return x2, 0.1 * x1 + F(x2)

    model = sequence(contracting, 40)
    with pytest.raises(
        revify.ReplayError, match=r"block 3[0-9] .contracting.: its input as reconstructed .* is off by"
    ):
        model(tokens()).sum().backward()


def test_gradients_are_right_and_not_only_the_same() -> None:
    model = sequence(additive, grid=20).double().eval()
    x = tokens().double().requires_grad_()
    model(x).square().sum().backward()
    direction, step = torch.randn_like(x), 1e-2
    with torch.no_grad():
        up, down = (model(x + sign * step * direction).square().sum() for sign in (1, -1))
    torch.testing.assert_close((x.grad * direction).sum(), (up - down) / (2 * step), rtol=2e-3, atol=1e-3)


# Inverse


@pytest.mark.parametrize("formula", EXACT)
def test_inverse_of_exact_couplings_on_the_grid(formula: Formula) -> None:
    model = sequence(formula, 6).eval()
    x = (tokens() * 4096).round() / 4096
    y, residues = model.forward_and_residues(x)
    assert torch.equal(y, model(x))
    assert not torch.equal(y, x)
    assert torch.equal(model.inverse(y, residues=residues), x)


def test_inverse_of_affine_couplings() -> None:
    model = affine_sequence(6).eval()
    assert difference(model.inverse(model(tokens())).detach(), tokens()) <= 1e-6
    model, x = model.double(), tokens().double()
    assert difference(model.inverse(model(x)).detach(), x) <= 1e-14


def test_inverse_has_gradients() -> None:
    model = affine_sequence(2).eval().double()
    y = tokens().double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(model.inverse(y)).sum(), y)
    torch.testing.assert_close(gradient, torch.ones_like(y))


def test_inverse_of_a_contraction_without_its_bits_is_refused() -> None:
    model = sequence(damped)
    with pytest.raises(revify.RevifyError, match="forward_and_residues"):
        model.inverse(model(tokens()))


# Streams


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("formula", [additive, swapped])
def test_odd_channel_counts(formula: Formula, depth: int) -> None:
    large, small, blocks = 4, 3, []
    for _ in range(depth):
        blocks.append(Reversible(Branch(small, large), Branch(large, small), coupling=formula, dim=2))
        large, small = (large, small) if formula is additive else (small, large)
    model, x = ReversibleSequence(blocks), (tokens(2, 5, 7) * 4096).round() / 4096
    assert_bitwise(model, x)
    model.eval()
    assert torch.equal(model.inverse(model(x)), x)


def test_a_pair_goes_in_and_comes_out() -> None:
    model, x = sequence(additive).eval(), tokens()
    pair = x.chunk(2, -1)
    y = model(pair)
    assert isinstance(y, tuple)
    assert torch.equal(torch.cat(y, -1), model(x))
    sum(part.sum() for part in y).backward()
    expected = gradients(model)
    model.zero_grad()
    with revify.plain_backward():
        model(x).sum().backward()
    assert_same(gradients(model), expected)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_with_batchnorm_count_once(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = ReversibleSequence(Reversible(Normed(), Normed()) for _ in range(4)).to(memory_format=layout)
    found = assert_bitwise(model, tokens(2, 6, 4, 5).contiguous(memory_format=layout))
    assert found["buffer blocks.0.F.0.num_batches_tracked"] == 1


# Memory and calls


class Tied(nn.Module):
    """A branch that shares its parameters with every other one, so that only activations can grow with depth."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def held(formula: Formula, depth: int) -> tuple[int, int]:
    """Bytes alive between forward and backward, and the most during backward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    with torch.no_grad():
        net[2].weight *= 0.1  # the same net in every block would make the streams grow, and floats drift
    count = len(derive(formula).forward.branches)
    wrap = partial(ScaleShift, channels=16, axis=-1) if formula is affine else (lambda branch: branch)
    model = ReversibleSequence(
        Reversible(*(wrap(Tied(net)) for _ in range(count)), coupling=formula, dim=-1) for _ in range(depth)
    )
    x = torch.randn(4, 50, 32)
    with Ledger() as ledger:
        loss = model(x).sum()
        between = ledger.alive()
        ledger.most = 0
        loss.backward()
    return between, ledger.most


STREAM = 4 * 50 * 32 * 4  # bytes of both streams


@pytest.mark.parametrize("formula", [additive, swapped, single, half, affine, formulas.leapfrog])
@pytest.mark.sampled(2)
def test_memory_does_not_grow_with_depth(formula: Formula) -> None:
    few, many = held(formula, 6), held(formula, 26)
    slack = 20 * (2600 if formula is affine else 100)  # samples or checksums; of affine, also gradients of w
    assert STREAM <= few[0] <= 3 * STREAM
    assert many[0] - few[0] <= slack
    assert many[1] - few[1] <= slack


def test_damped_couplings_hold_their_bits() -> None:
    few, many = held(damped, 3), held(damped, 23)
    bits = STREAM // 4 // 8
    assert 20 * bits <= many[0] - few[0] <= 20 * (bits + 200)


def test_plain_backward_holds_more_with_each_block() -> None:
    with revify.plain_backward():
        few, many = held(additive, 3), held(additive, 23)
    assert many[0] - few[0] > 20 * 4 * STREAM


def test_each_branch_runs_twice_and_hooks_on_blocks_fire_once() -> None:
    model, fired = sequence(additive), []
    for block in model:
        block.register_forward_hook(lambda module, args, output: fired.append(len(output)))
    model(tokens()).sum().backward()
    assert [branch.count.number for block in model for branch in (block.F, block.G)] == [2] * 8
    assert fired == [2] * 4


@pytest.mark.parametrize("formula", [affine, formulas.squashed, formulas.momentum])
def test_each_branch_runs_twice_with_other_couplings(formula: Formula) -> None:
    model = sequence(formula)
    model(tokens()).sum().backward()
    calls = [module.count.number for module in model.modules() if isinstance(module, Branch)]
    assert calls == [2] * len(calls)


# Situations


class Masked(Branch):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x * mask)


def test_side_inputs_have_gradients() -> None:
    torch.manual_seed(0)
    model = ReversibleSequence(Reversible(Masked(), Branch(), dim=-1) for _ in range(3))
    outcomes = []
    for plain in (True, False):
        mask = torch.linspace(0.5, 2, 5)[:, None].requires_grad_()
        torch.manual_seed(1)
        with revify.plain_backward() if plain else contextlib.nullcontext():
            model(tokens(), {"F": {"mask": mask}}).square().sum().backward()
        outcomes.append(mask.grad)
    assert outcomes[0].abs().min() > 0
    assert torch.equal(*outcomes)


def both_ways(model: nn.Module, x: Tensor, backward) -> None:
    """`backward(outputs of two forward passes)` gives the same gradients in both ways."""
    outcomes = []
    for plain in (True, False):
        model.zero_grad()
        torch.manual_seed(1)
        with revify.plain_backward() if plain else contextlib.nullcontext():
            backward(model(x), model(2 * x))
        outcomes.append(gradients(model))
    assert any(g.any() for g in outcomes[0].values())
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("formula", [additive, damped])
def test_two_passes_and_two_backwards(formula: Formula) -> None:
    both_ways(sequence(formula), tokens(), lambda a, b: (a.sum() + b.square().sum()).backward())
    both_ways(sequence(formula), tokens(), lambda a, b: (b.sum().backward(), a.square().sum().backward()))
    twice = lambda a, b: (a.square().sum().backward(retain_graph=True), b.sum().backward(), a.sum().backward())  # noqa: E731
    both_ways(sequence(formula), tokens(), twice)


def test_second_backward_in_floats() -> None:
    model = affine_sequence(3).double().eval()
    loss = model(tokens().double()).square().sum()
    wanted = list(model.parameters())
    first, second = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", [sequence(additive, 3), affine_sequence(3)], ids=["additive", "affine"])
def test_double_backward(model: ReversibleSequence) -> None:
    model, outcomes = copy.deepcopy(model).double().eval(), []
    for plain in (True, False):
        model.zero_grad()
        x = tokens().double().requires_grad_()
        with revify.plain_backward() if plain else contextlib.nullcontext():
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            slope.square().sum().backward()
        outcomes.append({"input": x.grad, **gradients(model)})
    for name, expected in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], expected, rtol=1e-10, atol=1e-10)


def test_frozen_branches_and_an_input_without_gradient() -> None:
    model = sequence(additive)
    model.blocks[1].requires_grad_(False)
    model.blocks[0].F.requires_grad_(False)
    outcomes = []
    for plain in (True, False):
        model.zero_grad()
        torch.manual_seed(1)
        with revify.plain_backward() if plain else contextlib.nullcontext():
            model(tokens()).square().sum().backward()
        outcomes.append(gradients(model))
    assert 0 < len(outcomes[0]) < len(list(model.parameters()))
    assert_same(outcomes[1], outcomes[0])


def test_no_gradients_nothing_held() -> None:
    model = sequence(additive).eval()
    with torch.no_grad():
        y = model(tokens())
    assert not y.requires_grad
    assert torch.equal(y, model(tokens()))


def test_a_sequence_within_a_branch() -> None:
    torch.manual_seed(0)
    inner = [ReversibleSequence(Reversible(nn.Linear(3, 3), nn.Tanh(), dim=-1) for _ in range(2)) for _ in range(2)]
    model = ReversibleSequence(Reversible(net, nn.Linear(6, 6), dim=-1) for net in inner)
    assert_bitwise(model, tokens(2, 5, 12))


def test_copies_and_pickles() -> None:
    model = sequence(damped).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens()), model(tokens()))
    assert [name for name, _ in model[0].named_children()] == ["F", "G"]


# Guards


class Forgetful(Branch):
    """Another value at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.count.number)


@pytest.mark.parametrize("formula", [additive, formulas.rotation])
def test_a_branch_that_does_not_repeat_itself(formula: Formula) -> None:
    branches = [Forgetful() for _ in derive(formula).forward.branches]
    model = ReversibleSequence([Reversible(*branches, coupling=formula, dim=-1), *sequence(formula, 2)])
    with pytest.raises(revify.ReplayError, match="block 0"):
        model(tokens()).square().sum().backward()


def test_outputs_changed_in_place() -> None:
    y = sequence(additive)(tokens())
    y.mul_(2)
    with pytest.raises(revify.StreamError, match="changed in place"):
        y.sum().backward()


def test_a_branch_that_changes_its_input_in_place() -> None:
    block = Reversible(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), Branch(), dim=-1)
    with pytest.raises(revify.StreamError, match="branch F changes its input in place"):
        block(tokens())


def test_values_out_of_range() -> None:
    with pytest.raises(revify.GridRangeError, match=r"block 0 .*grid=1[0-9]"):
        sequence(additive, grid=20)(tokens() * 100)


@pytest.mark.parametrize("coupling", [additive, affine, damped])
def test_values_that_are_not_finite_flow(coupling: Formula) -> None:
    model, x = sequence(coupling), tokens()
    x[0, 0, 0] = torch.nan
    given = x.clone().requires_grad_()
    model(given).sum().backward()
    with revify.plain_backward():
        plain = x.clone().requires_grad_()
        model(plain).sum().backward()
    assert given.grad[0].isnan().any()
    assert torch.equal(given.grad[1].isfinite(), plain.grad[1].isfinite())


def test_without_gradients_nothing_of_the_grid_raises() -> None:
    with torch.no_grad():
        assert sequence(additive, grid=20)(tokens() * 100).isfinite().all()


def test_a_hook_that_replaces_the_streams() -> None:
    model = sequence(additive)
    model[1].register_forward_hook(lambda module, args, output: tuple(y * 2 for y in output))
    with pytest.raises(revify.StreamError, match=r"block 1.*hooks may look"):
        model(tokens())


def test_what_does_not_fit() -> None:
    with pytest.raises(revify.RevifyError, match=r"additive has 2 branches \(F, G\), got Branch, Branch, Branch"):
        Reversible(Branch(), Branch(), Branch())
    with pytest.raises(revify.RevifyError, match="at least one block"):
        ReversibleSequence([])
    with pytest.raises(revify.RevifyError, match="2 different settings"):
        ReversibleSequence([*sequence(additive, 1), *sequence(additive, 1, grid=10)])
    with pytest.raises(revify.RefusalError, match="solved"):
        Reversible(Branch(), coupling=lambda x1, x2, F: (x1 + F(x2), x1))
    with pytest.raises(revify.StreamError, match="do not fit each other"):
        Reversible(Branch(3, 4), Branch(), dim=-1)(tokens())
    with pytest.raises(revify.StreamError, match="came out as"):
        Reversible(Branch(4), Branch(4), dim=-1)((tokens(2, 5, 1), tokens(2, 5, 4)))
    with pytest.raises(revify.StreamError, match="cannot be split into 2 streams"):
        Reversible(Branch(), Branch(), dim=3)(tokens())
    with pytest.raises(revify.StreamError, match="got tuple of 3"):
        sequence(additive)((tokens(),) * 3)
    with pytest.raises(revify.RevifyError, match="side inputs for H: the branches are F, G"):
        sequence(additive)(tokens(), {"H": {}})
