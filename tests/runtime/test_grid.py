"""The grid loses no bit: what a step makes, the inverse undoes; and its gradients are those of the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from revify.runtime.grid import Gap, Grid, Join, OnGrid, Resume, pack, step, stream_dtype, unpack, unstep
from revify.runtime.predictors import Identity, Midpoint
from revify.words import MAX_BITS

GRID = Grid(12)
BITS = range(MAX_BITS + 1)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def on_grid(shape: tuple[int, ...], seed: int, *, dtype: torch.dtype = torch.float32, reach: int = 2**23) -> Tensor:
    """Random grid values, up to half of the range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-reach, reach, shape, generator=generator).to(dtype) / GRID.scale


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 5, 1, 1), (0, 3, 2, 2), (2, 8, 4, 4)])
def test_inverse_gives_back_every_bit(bits: int, shape: tuple[int, ...]) -> None:
    for seed, reach in enumerate((1, 2, 300, 2**23)):
        t, gap = on_grid(shape, seed, reach=reach), on_grid(shape, seed + 9, reach=reach)
        value, residue = step(t, gap, bits, GRID)
        assert torch.equal(unstep(value, t, residue, bits, GRID), gap)


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
@pytest.mark.parametrize("layout_t", LAYOUTS)
@pytest.mark.parametrize("layout_gap", LAYOUTS)
def test_inverse_does_not_depend_on_strides(bits: int, layout_t: str, layout_gap: str) -> None:
    t, gap = LAYOUTS[layout_t](on_grid((2, 3, 5, 7), 0)), LAYOUTS[layout_gap](on_grid((2, 3, 5, 7), 1))
    value, residue = step(t, gap, bits, GRID)
    assert torch.equal(unstep(value, t, residue, bits, GRID), gap)


@pytest.mark.parametrize("bits", BITS)
def test_step_follows_the_formula(bits: int) -> None:
    """z = t + floor(u / 2^b) in whole grid points, reckoned with Python's integers."""
    t, gap = on_grid((40,), 0), on_grid((40,), 1)
    value, _ = step(t, gap, bits, GRID)
    points = [int(p) for p in (t.double() * GRID.scale).tolist()]
    gaps = [int(p) for p in (gap.double() * GRID.scale).tolist()]
    expected = [(p + g // 2**bits) / GRID.scale for p, g in zip(points, gaps, strict=True)]
    assert value.tolist() == expected


@pytest.mark.parametrize("bits", BITS)
def test_step_in_float64(bits: int) -> None:
    t, gap = (on_grid((30,), seed, dtype=torch.float64, reach=2**51) for seed in (0, 1))
    value, residue = step(t, gap, bits, GRID)
    assert value.dtype == torch.float64
    assert torch.equal(unstep(value, t, residue, bits, GRID), gap)


def test_step_leaves_its_inputs_alone() -> None:
    t, gap = on_grid((30,), 0), on_grid((30,), 1)
    kept = t.clone(), gap.clone()
    value, residue = step(t, gap, 3, GRID)
    unstep(value, t, residue, 3, GRID)
    assert torch.equal(t, kept[0])
    assert torch.equal(gap, kept[1])


@pytest.mark.parametrize("bits", BITS[1:])
def test_residue_takes_its_bits_and_no_more(bits: int) -> None:
    _, residue = step(on_grid((8, 100), 0), on_grid((8, 100), 1), bits, GRID)
    assert residue is not None
    assert residue.dtype == torch.uint8
    assert residue.numel() == 800 * bits // 8
    _, odd = step(on_grid((7, 11), 0), on_grid((7, 11), 1), bits, GRID)
    assert odd is not None
    assert math.ceil(77 * bits / 8) <= odd.numel() <= math.ceil(77 * bits / 8) + 3


def test_no_bits_no_residue() -> None:
    assert step(on_grid((4,), 0), on_grid((4,), 1), 0, GRID)[1] is None


@pytest.mark.parametrize("bits", BITS[1:])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 256])
def test_unpack_gives_every_number_back(bits: int, count: int) -> None:
    numbers = (torch.arange(count) % 2**bits).to(torch.uint8)
    assert torch.equal(unpack(pack(numbers, bits), bits, torch.empty(count)), numbers)


def test_rounding_is_to_the_nearest_grid_point() -> None:
    values = torch.tensor([0.0, 1.0, 1.00001, 0.9999, -3.3, 1000.123])
    points = GRID.round(values)
    assert torch.equal(points * GRID.scale, (points * GRID.scale).round())
    assert ((points - values).abs() <= 0.5 / GRID.scale).all()
    assert torch.equal(GRID.round(points), points)


def test_rounding_never_gives_minus_zero() -> None:
    points = GRID.round(torch.tensor([-1e-9, -0.0, 1e-9]))
    assert not torch.signbit(points).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_keeps_strides_and_makes_a_new_tensor(layout: str) -> None:
    values = LAYOUTS[layout](on_grid((2, 3, 5, 7), 0))
    points = GRID.round(values)
    assert points.stride() == values.stride()
    assert points.data_ptr() != values.data_ptr()


def test_stream_is_float32_or_longer() -> None:
    assert GRID.round(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert GRID.round(torch.ones(1, dtype=torch.float16)).dtype == torch.float32
    assert GRID.round(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert stream_dtype(torch.float16) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("resolution", [0, 12, 20])
def test_limit_is_where_exactness_ends(dtype: torch.dtype, resolution: int) -> None:
    grid = Grid(resolution)
    limit, point = torch.tensor(grid.limit(dtype), dtype=dtype), torch.tensor(1 / grid.scale, dtype=dtype)
    assert (limit - point) + point == limit
    assert limit + point == limit, "beyond the limit the next grid point is no number of this type"


def test_rounding_passes_gradients_straight_through() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(5).to(dtype).requires_grad_()
        upstream = torch.randn(5)
        OnGrid.apply(values, GRID).backward(upstream)
        assert values.grad.dtype == dtype
        assert torch.equal(values.grad, upstream.to(dtype))


def through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of one, the gradient of the other."""
    return smooth + (exact - smooth).detach()


def by_hand(older: Tensor, z: Tensor, weight: Tensor, bits: int, midpoint: bool) -> Tensor:
    """The step as a formula that autograd differentiates, with rounding and floor straight through."""
    raw = (weight * z).tanh()
    t = through((raw * GRID.scale).round() / GRID.scale, raw)
    gap = older - (2 * z - t if midpoint else z)
    kept = through((gap * GRID.scale / 2**bits).floor() / GRID.scale, gap / 2**bits)
    return t + kept


def by_functions(older: Tensor, z: Tensor, weight: Tensor, bits: int, midpoint: bool) -> Tensor:
    """The step as the runtime does it."""
    predictor = Midpoint() if midpoint else Identity()
    gap = Gap.apply(older, predictor.before(z), bits)
    t = OnGrid.apply((weight * z).tanh(), GRID)
    value, _ = Join.apply(t, gap, predictor.after(t), bits, GRID)
    return value


@pytest.mark.parametrize("midpoint", [False, True])
@pytest.mark.parametrize("bits", [0, 1, 2, 5, 8])
def test_gradients_are_those_of_the_formula(bits: int, midpoint: bool) -> None:
    """Value, first and second derivatives with respect to z[k-1], z[k] and what is inside of the branch, in float64."""
    leaves = [on_grid((3, 7), seed, dtype=torch.float64, reach=2**14).requires_grad_() for seed in (0, 1)]
    leaves.append(torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_())
    weights = torch.linspace(-1, 2, 21, dtype=torch.float64).view(3, 7)
    results = []
    for function in (by_hand, by_functions):
        value = function(*leaves, bits, midpoint)
        first = torch.autograd.grad((value * value * weights).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        results.append([value, *first, *second])
    assert results[0][1].abs().min() > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_step_without_a_gradient_on_one_side() -> None:
    z = on_grid((4,), 0)
    t = on_grid((4,), 1).requires_grad_()
    value, _ = Join.apply(t, Gap.apply(z, z, 1), None, 1, GRID)
    value.sum().backward()
    assert torch.equal(t.grad, torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_through_a_shorter_copy_loses_nothing(dtype: torch.dtype) -> None:
    """The copy that hooks see gets the gradient as far as its type holds it, and the value gets the rest."""
    value = on_grid((50,), 0).requires_grad_()
    shown = value.to(dtype)
    shown.retain_grad()
    upstream = torch.randn(50) * 1e3
    upstream[0] = 1e6  # more than float16 holds
    resumed = Resume.apply(shown, value)
    assert torch.equal(resumed, value)
    resumed.backward(upstream)
    assert torch.equal(value.grad, upstream)
    assert shown.grad.isfinite().all()
    torch.testing.assert_close(shown.grad[1:], upstream[1:].to(dtype), rtol=0, atol=0)


def test_step_whose_value_has_no_gradient_gives_none() -> None:
    """What comes after a step may return no gradient at all for it (an autograd function of the user's)."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    t, z = on_grid((4,), 0).requires_grad_(), on_grid((4,), 1).requires_grad_()
    value, _ = Join.apply(t, Gap.apply(z, z * 2, 1), None, 1, GRID)
    (Cut.apply(value) + z).sum().backward()
    assert t.grad is None or not t.grad.any()
    assert torch.equal(z.grad, torch.ones(4))
