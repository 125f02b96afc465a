"""Checksums see every change of a bit and of a place; fingerprints see what autograd saved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from revify.runtime.fingerprints import COLUMNS, Fingerprint, checksum, comparable

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)


def flip(bits: Tensor, places: Tensor) -> None:
    """Two opposite steps of one unit in the last place, which a plain sum does not see."""
    bits[places[0]] += 1
    bits[places[1]] -= 1


def swap(bits: Tensor, places: Tensor) -> None:
    bits[places] = bits[places.flip(0)]


def turn_signs(bits: Tensor, places: Tensor) -> None:
    bits[places] ^= -(2**31)


def turn_signs_in_a_column(bits: Tensor, places: Tensor) -> None:
    turn_signs(bits, torch.stack([places[0] % COLUMNS, places[0] % COLUMNS + COLUMNS * (1 + places[1] % 10)]))


def turn_one_bit_of_two(bits: Tensor, places: Tensor) -> None:
    bits[places] ^= 2 ** int(places[0] % 31)


@pytest.mark.parametrize("change", [flip, swap, turn_signs, turn_signs_in_a_column, turn_one_bit_of_two])
def test_changes_of_two_values_are_seen(change: Callable[[Tensor, Tensor], None]) -> None:
    """10,000 random pairs; each goes unseen with a probability of about 2^-32."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(13, 241, generator=generator)
    before = checksum(values)
    seen = 0
    for places in torch.randint(values.numel(), (10_000, 2), generator=generator):
        changed = values.clone()
        change(changed.view(-1).view(torch.int32), places)
        differs = not torch.equal(changed.view(torch.int32), values.view(torch.int32))
        assert (checksum(changed) != before) == differs, places
        seen += differs
    assert seen > 9_000


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.flip(0),
        lambda z: z.flip(1),
        lambda z: z.roll(1, 1),
        lambda z: z[torch.randperm(len(z), generator=torch.Generator().manual_seed(1))],
        lambda z: -z,
        lambda z: z.view(241, 13).t().reshape(13, 241),
    ],
)
def test_permutations_are_seen(change: Callable[[Tensor], Tensor]) -> None:
    values = torch.randn(13, 241, generator=torch.Generator().manual_seed(0))
    assert checksum(change(values)) != checksum(values)
    assert checksum(values.clone()) == checksum(values)


@pytest.mark.parametrize("size", [1, 2, 3, COLUMNS - 1, COLUMNS, COLUMNS + 1, 140_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_size(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(size, generator=generator) * 10).to(dtype)
    before = checksum(values)
    assert checksum(values.clone()) == before
    for place in {0, size // 2, size - 1}:
        changed = values.clone()
        changed[place] = ~changed[place] if dtype == torch.bool else changed[place] + 1
        assert checksum(changed) != before, place


def test_a_change_of_one_bit_is_seen_at_every_place() -> None:
    values = torch.randn(2 * COLUMNS + 5, generator=torch.Generator().manual_seed(0))
    before = checksum(values)
    for place in range(values.numel()):
        for bit in (1, 2**15, 2**30):
            changed = values.clone()
            changed.view(torch.int32)[place] ^= bit
            assert checksum(changed) != before


def test_nothing_and_what_is_no_ordinary_tensor() -> None:
    assert checksum(torch.empty(0)) == 0
    assert not comparable(torch.eye(3).to_sparse())
    assert not comparable(torch.empty(3, device="meta"))
    assert not comparable("text")
    assert comparable(torch.nn.Parameter(torch.ones(2)))


def fingerprint(*saved: Tensor, whole_last: bool = False) -> Tensor:
    found = Fingerprint(whole_last=whole_last)
    for tensor in saved:
        found.add(tensor)
    return found.value()[torch.device("cpu")]


def test_a_fingerprint_sees_noise_in_a_large_tensor_and_any_change_of_a_small_one() -> None:
    large, small = torch.randn(4, 100, 96), torch.randn(30, 30)
    before = fingerprint(large, small)
    assert fingerprint(large.clone(), small.clone()) == before
    assert fingerprint(large * (1 + 1e-6 * torch.rand(large.shape)), small) != before
    one = small.clone()
    one[20, 7] += 1e-6
    assert fingerprint(large, one) != before


@pytest.mark.parametrize("view", [lambda z: z.transpose(1, 2), lambda z: z[:, ::2], lambda z: z.expand(3, *z.shape)])
def test_a_fingerprint_of_what_lies_in_memory_with_gaps(view: Callable[[Tensor], Tensor]) -> None:
    large = torch.randn(4, 100, 96)
    before = fingerprint(view(large))
    assert fingerprint(view(large.clone())) == before
    assert fingerprint(view(large * (1 + 1e-6 * torch.rand(large.shape)))) != before


def test_the_last_saved_tensor_as_a_whole() -> None:
    large = torch.randn(4, 100, 96)
    before = fingerprint(large, whole_last=True)
    for place in range(0, large.numel(), 1009):
        changed = large.clone()
        changed.view(-1)[place] += 1e-6
        assert fingerprint(changed, whole_last=True) != before


def test_what_kernels_may_leave_unset_is_not_looked_at() -> None:
    value = torch.ones(3)
    for unset in (torch.zeros((), dtype=torch.int64), torch.zeros(9, dtype=torch.uint8), torch.empty(0)):
        assert fingerprint(value, unset) == fingerprint(value, unset + 5)
