"""Blocks made by hand in the situations that users bring: hooks, wrappers, streams one by one, errors, inverses."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from asserts import assert_same, difference, gradients, run
from ledger import Ledger
from test_reversible import EXACT, Branch, affine_sequence, assert_bitwise, sequence, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import revify
from revify import Reversible, ReversibleSequence
from revify.couplings import additive, affine, damped, half, single, swapped
from revify.couplings.formulas import Formula


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def both(work) -> tuple[object, object]:
    """What `work` gives under ordinary autograd, and without stored activations."""
    found = []
    for plain in (True, False):
        torch.manual_seed(1)
        with revify.plain_backward() if plain else contextlib.nullcontext():
            found.append(work())
    return found[0], found[1]


# Streams


@pytest.mark.parametrize("depth", [1, 3])
def test_streams_are_given_one_by_one(depth: int) -> None:
    model, x = sequence(additive, depth).eval(), tokens()
    for module in (model, model[0]):
        y = module(*x.chunk(2, -1))
        assert isinstance(y, tuple)
        assert torch.equal(torch.cat(y, -1), module(x))
        assert_same(dict(enumerate(module.inverse(*y))), dict(enumerate(module.inverse(torch.cat(y, -1)).chunk(2, -1))))
    sides = {"F": {}}
    assert torch.equal(model(*x.chunk(2, -1), sides)[0], model(x, side=sides).chunk(2, -1)[0])


def test_too_many_streams_are_refused() -> None:
    with pytest.raises(revify.StreamError, match="got tuple of 3"):
        sequence(additive)(tokens(), tokens(), tokens())


def test_branches_that_are_left_out_are_copies_of_the_first() -> None:
    torch.manual_seed(0)
    block = Reversible(Branch(), dim=-1)
    assert_same(block.F.state_dict(), block.G.state_dict())
    assert not {id(p) for p in block.F.parameters()} & {id(p) for p in block.G.parameters()}
    assert_bitwise(ReversibleSequence(Reversible(Branch(), dim=-1) for _ in range(2)), tokens())


# Hooks


@pytest.mark.parametrize("formula", [additive, swapped, damped])
@pytest.mark.parametrize("depth", [1, 3])
def test_full_backward_hooks_on_blocks_see_what_they_see_in_ordinary_autograd(formula: Formula, depth: int) -> None:
    model, seen = sequence(formula, depth), []

    def note(module: nn.Module, into: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        seen.append([*(g.clone() for g in into if g is not None), *(g.clone() for g in out)])

    for block in model:
        block.register_full_backward_hook(note)
        block.register_full_backward_pre_hook(lambda module, out: tuple(2 * g for g in out))

    def work() -> list[list[Tensor]]:
        seen.clear()
        assert_bitwise(model, tokens())
        model(tokens().requires_grad_()).square().sum().backward()
        return list(seen)

    expected, found = both(work)
    assert len(found) == 3 * depth
    assert all(len(one) == 4 for one in found)
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_hook_may_hand_on_an_alias_as_in_a_converted_model() -> None:
    model = sequence(additive)
    model[1].register_forward_hook(lambda module, args, output: tuple(y.view_as(y) for y in output))
    model[2].register_forward_pre_hook(lambda module, args: tuple(x.view(x.shape) for x in args))
    assert_bitwise(model, tokens())


@pytest.mark.parametrize("depth", [1, 3])
def test_a_hook_that_changes_a_stream_in_place_is_refused(depth: int) -> None:
    model = sequence(additive, depth)

    def double(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        output[0].mul_(2)

    model[0].register_forward_hook(double)
    with pytest.raises(revify.StreamError, match=r"block 0: a hook on a block changed a stream in place"):
        model(tokens())


@pytest.mark.parametrize("depth", [1, 2])
def test_hooks_on_the_blocks_of_a_sequence_fire_once(depth: int) -> None:
    model, fired = sequence(additive, depth), []
    for block in model:
        block.register_forward_hook(lambda module, args, output: fired.append((len(args), len(output))))
    model(tokens()).sum().backward()
    assert fired == [(2, 2)] * depth


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("formula", [additive, damped])
def test_fsdp_of_each_block_of_a_sequence(one_process: None, formula: Formula, root: bool) -> None:
    model, x = sequence(formula, 3), (tokens(),)
    expected = run(copy.deepcopy(model), x, plain=True)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model:
        fully_shard(block, mesh=mesh)
    if root:
        fully_shard(model, mesh=mesh)
    for _ in range(2):
        found = run(model, x)
        assert_same({n: t.to_local() if hasattr(t, "to_local") else t for n, t in found.items()}, expected)


# Errors


class FailsOnce(Branch):
    """Its second run fails, but for the next time."""

    def __init__(self) -> None:
        super().__init__()
        self.fails_at = 2

    def forward(self, *streams: Tensor) -> Tensor:
        value = super().forward(*streams)
        if self.count.number == self.fails_at:
            raise MemoryError("out of memory, for once")
        return value


@pytest.mark.parametrize("place", ["F", "G"])
@pytest.mark.parametrize("formula", EXACT)
def test_a_second_try_after_an_error_in_a_second_run(formula: Formula, place: str) -> None:
    torch.manual_seed(0)
    model = sequence(formula, 3)
    if not hasattr(model[1], place):
        pytest.skip("the coupling has one branch")
    setattr(model[1], place, FailsOnce())
    expected = run(copy.deepcopy(model), (tokens(),), plain=True)
    x = tokens().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    loss = (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum()
    with pytest.raises(MemoryError, match="for once"):
        loss.backward(retain_graph=True)
    model.zero_grad()
    x.grad = None
    loss.backward()
    assert_same(gradients(model), {n: g for n, g in expected.items() if n.startswith("grad")})
    assert torch.equal(x.grad, expected["input 0"])


# Inverse


@pytest.mark.parametrize("formula", EXACT)
def test_an_inverse_has_the_gradients_of_ordinary_autograd_bit_for_bit(formula: Formula) -> None:
    model = sequence(formula, 3).eval()
    y, residues = model.forward_and_residues(tokens())

    def work() -> dict[str, Tensor]:
        model.zero_grad()
        given = y.detach().clone().requires_grad_()
        x = model.inverse(given, residues=[{n: r.clone() for n, r in kept.items()} for kept in residues])
        (x * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum().backward()
        return {"input": given.grad, "output": x.detach(), **gradients(model)}

    expected, found = both(work)
    assert expected["input"].any()
    assert_same(found, expected)


def test_an_inverse_in_floats_has_nearly_the_gradients_of_ordinary_autograd() -> None:
    model = affine_sequence(3).eval().double()
    y = model(tokens().double()).detach()

    def work() -> dict[str, Tensor]:
        model.zero_grad()
        given = y.clone().requires_grad_()
        model.inverse(given).square().sum().backward()
        return {"input": given.grad, **gradients(model)}

    expected, found = both(work)
    for name in expected:
        assert difference(found[name], expected[name]) <= 1e-12 * float(expected["input"].abs().max())  # rounding


@pytest.mark.parametrize("formula", [additive, swapped, single, half, affine])
@pytest.mark.sampled(3)
def test_the_memory_of_an_inverse_does_not_grow_with_depth(formula: Formula) -> None:
    def held(depth: int) -> int:
        model = (affine_sequence if formula is affine else lambda n: sequence(formula, n))(depth).eval()
        y = model(tokens(4, 50, 6)).detach()
        gc.collect()
        with Ledger() as ledger:
            loss = model.inverse(y).sum()
            between = ledger.alive()
            loss.backward()
        return between

    few, many = held(4), held(12)
    activations = 4 * 50 * 7 * 4
    assert many - few <= 8 * (4 * 256 * 4 + 400)  # samples or checksums of two streams
    assert many - few < activations or formula is affine


@pytest.mark.parametrize("depth", [1, 3])
def test_an_inverse_that_draws_random_numbers_is_refused(depth: int) -> None:
    model = sequence(additive, depth)
    y = model(tokens())
    for gradient in (torch.enable_grad(), torch.no_grad()):
        with gradient, pytest.raises(revify.StreamError, match=r"block \d .* drew random numbers .* Call eval"):
            model.inverse(y)
    model[0].eval()
    assert difference(model[0].inverse(model[0](tokens())).detach(), tokens()) <= 2**-12  # the grid


# The grid


@pytest.mark.parametrize("size", [1e-3, 1, 1e4])
@pytest.mark.parametrize("depth", [1, 4])
def test_the_grid_is_chosen_from_what_flows(size: float, depth: int) -> None:
    model, x = sequence(additive, depth), tokens() * size
    state, buffers = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    resolution = model.fit_grid(x)
    assert torch.equal(state, torch.get_rng_state())
    assert_same(model.state_dict(), buffers)
    assert [block.grid for block in model] == [resolution] * depth
    assert (resolution <= 6) if size > 1 else (16 <= resolution <= 20)
    assert_bitwise(model, x)
    model.eval()
    assert difference(model.inverse(model(x)).detach(), x) <= 2.0**-resolution
    assert model[0].fit_grid(x * 1e3) <= resolution


def test_no_grid_fits_values_that_are_not_finite() -> None:
    with pytest.raises(revify.StreamError, match="no grid fits"):
        sequence(additive).fit_grid(tokens() * float("inf"))
