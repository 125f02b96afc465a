"""The code of an update: exact to undo, for every finite stream, and no sample knows of another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revify.runtime.codes import MAX_BITS, MIN_BITS, Code, Running, code_bytes, decode, group_size

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ("normal", "zeros", "one huge value", "tiny", "denormal", "dead samples")
LAYOUTS = ("contiguous", "channels last", "transposed", "strided", "expanded")

BITS = range(MIN_BITS, MAX_BITS + 1)


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "zeros":
        x = torch.zeros(shape)
    if kind == "one huge value" and x.numel():
        x.view(-1)[0] = 30000.0
    if kind == "tiny":
        x = x * 1e-6
    if kind == "denormal":
        x = x * 1e-40
    if kind == "dead samples":
        x[::2] = 0
    return x.to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another order of memory."""
    if layout == "channels last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x
    if layout == "expanded" and x.dim() >= 2:
        return x[:, :1].expand_as(x)
    return x


def walk(x: Tensor, updates: list[Tensor], bits: int) -> tuple[list[Running], list[Code]]:
    """A stream that begins with x and takes these updates."""
    running, found, codes = Running.of(x), [], []
    found.append(running)
    for update in updates:
        running, code = running.stepped(running.z + update, bits)
        found.append(running)
        codes.append(code)
    return found, codes


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple),
    dtype=st.sampled_from(DTYPES),
    first=st.sampled_from(KINDS),
    later=st.sampled_from(KINDS),
    layout=st.sampled_from(LAYOUTS),
    bits=st.integers(MIN_BITS, MAX_BITS),
    seed=st.integers(0, 99),
)
@settings(max_examples=400, deadline=None)
def test_any_finite_stream_is_had_again(
    shape: tuple[int, ...], dtype: torch.dtype, first: str, later: str, layout: str, bits: int, seed: int
) -> None:
    x = laid_out(values(first, shape, dtype, seed), layout)
    stream, codes = walk(x, [values(later, shape, torch.float32, seed + k) for k in range(1, 4)], bits)
    frame, g = stream[0].frame, stream[0].g
    summed = stream[0].z.clone()
    for running, code in zip(stream[1:], codes, strict=True):
        summed = summed + decode(code, g, bits, frame)
        assert torch.equal(summed, running.z)
        assert code.values.nbytes + code.scales.nbytes == code_bytes(shape, bits)
    assert all(running.z.stride() == stream[0].z.stride() for running in stream)
    if not bool(stream[-1].subtracts):
        return
    z = stream[-1].z
    for before, code in zip(stream[-2::-1], codes[::-1], strict=True):
        z = z - decode(code, g, bits, frame)
        assert torch.equal(z, before.z)
        assert torch.equal(torch.signbit(z), torch.signbit(before.z))


@pytest.mark.parametrize("first", KINDS)
def test_ordinary_streams_are_within_the_range_where_codes_subtract(first: str) -> None:
    stream, _ = walk(values(first, (4, 7, 32), torch.float32, 0), [torch.randn(4, 7, 32) * 1e-6] * 24, 8)
    assert bool(stream[-1].subtracts) == (
        first != "denormal"
    )  # a stream that begins with zeros counts as one of size 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 5, 33), (3, 64), (3, 8, 4, 4), (3, 7)])
def test_the_code_of_a_sample_does_not_depend_on_the_others(bits: int, shape: tuple[int, ...]) -> None:
    x, others = torch.randn(shape), torch.randn(shape) * 100
    updates = [torch.randn(shape) for _ in range(3)]
    mixed = torch.cat([x[:1], others[1:]])
    alone = walk(x[:1], [u[:1] for u in updates], bits)[0][-1].z
    together = walk(mixed, [torch.cat([u[:1], u[1:] * 50]) for u in updates], bits)[0][-1].z
    assert torch.equal(alone[0], together[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_group_and_its_sample(bad: float) -> None:
    x = torch.randn(2, 4, 32)
    update = torch.randn(2, 4, 32)
    update[0, 1, 3] = bad
    z = walk(x, [update], 8)[0][-1].z
    assert not torch.isfinite(z[0, 1]).any()
    assert torch.isfinite(z[0, [0, 2, 3]]).all()
    assert torch.isfinite(z[1]).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_code_is_off_by_half_a_step_at_most_and_the_rest_is_carried_along(bits: int) -> None:
    x, update = torch.randn(4, 16, 32), torch.randn(4, 16, 32)
    running = Running.of(x)
    wanted = x + update
    following, code = running.stepped(wanted, bits)
    step = (code.scales.float() * running.g.unsqueeze(-1)).expand(-1, -1, 32).reshape(x.shape)
    assert ((following.z - wanted).abs() <= 0.5001 * step).all()
    assert torch.allclose(following.z + following.error, wanted, atol=1e-5)  # the sums of floats above are not exact


def test_updates_too_small_for_the_grid_arrive_all_the_same_once_they_add_up() -> None:
    x = torch.randn(2, 8, 32) * 100
    small = torch.full_like(x, 2e-4)
    stream, _ = walk(x, [small] * 400, 4)
    assert (stream[1].z != stream[0].z).float().mean() < 0.1  # it is a twentieth of a point of the grid
    moved = (stream[-1].z - stream[0].z).mean()
    assert 0.07 < float(moved) < 0.09


def test_groups_fit_into_a_sample_where_they_can() -> None:
    assert [group_size(n) for n in (192 * 197, 64 * 49, 77 * 30, 30, 7, 1, 0)] == [32, 32, 33, 30, 32, 32, 32]
