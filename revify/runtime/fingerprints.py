"""Numbers that say whether a second run gave the bits of the first: of one tensor, and of all that autograd saved.

A checksum sees the values' bits as a table of 32-bit integers. Each column is summed up with two sets of odd pseudo-random
weights of the rows, modulo 2^32, and once more from the upper halves of the integers alone; these sums are added up with odd
pseudo-random weights of 64 bits. One changed integer always changes the sums of its column, since an odd weight has an
inverse. Changes of several (flips, swaps, permutations) that know nothing of the weights cancel with a probability of about
2^-32: the upper halves are there for changes of the topmost bits alone (two values that change their sign), which weights
modulo 2^32 hardly tell apart.

Nothing here reads a number from a device: what is compared stays there until the end of the backward.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

COLUMNS = 256
ROWS = 512  # at a time, so that the upper halves take little memory; what came before is multiplied by FACTOR
FACTOR = -1640531535
FEW = 1024  # elements, up to which a saved tensor is taken as a whole
SAMPLE = 256  # elements of a larger one
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
DTYPES = frozenset((*FLOATS, torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # two for each number of 64 bits


def checksum(values: Tensor) -> Tensor:
    """A number that changes with any bit and any place of the values, but for about one change in 2^32."""
    return _sum(_integers(values.detach().reshape(-1)))


def comparable(value: object) -> bool:
    """Whether it is an ordinary tensor with data, so that its bits can be compared."""
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and value.dtype in DTYPES
        and not value.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


class Fingerprint:
    """Of the tensors that autograd saves in one run: small ones as a whole, of larger ones SAMPLE values spread over it.

    The last of them is taken as a whole, too, where nothing else shows what became of the values: a run that ends at
    its last saved tensor has no output to be compared.

    Args:
        whole_last: whether it is.
    """

    def __init__(self, *, whole_last: bool) -> None:
        self._whole_last = whole_last
        self._last: Tensor | None = None
        self._count = 0
        self._samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def add(self, tensor: Tensor) -> None:
        """Autograd has saved this tensor."""
        if not comparable(tensor) or _may_be_left_unset(tensor):
            return
        tensor = tensor.detach()
        if self._whole_last:
            self._last = tensor
        self._count += 1
        self._samples.setdefault((tensor.device, tensor.dtype), []).append(_sample(tensor, self._count))

    def value(self) -> dict[torch.device, Tensor]:
        """The number of what was saved on each device; the samples are gone afterwards."""
        integers: dict[torch.device, list[Tensor]] = {}
        for (device, _), samples in self._samples.items():
            integers.setdefault(device, []).append(_integers(torch.cat(samples)))
        found = {device: _sum(torch.cat(parts) if len(parts) > 1 else parts[0]) for device, parts in integers.items()}
        if self._last is not None:
            found[self._last.device] += checksum(self._last)
        self._last, self._samples = None, {}
        return found


def _may_be_left_unset(tensor: Tensor) -> bool:
    """Seeds and offsets of attention kernels (set only where they drop), and the work space of recurrent ones."""
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
        return False
    return tensor.dtype == torch.uint8 or tensor.numel() <= 2


def _sample(tensor: Tensor, number: int) -> Tensor:
    """A copy of the values that are compared: along memory where the tensor has no gaps there, else on a lattice."""
    size = tensor.numel()
    if size <= FEW:
        return tensor.flatten().clone()
    if tensor.is_contiguous():
        step = size // SAMPLE | 1  # odd, so as not to meet the same channel of an even number every time
        start = number * 7919 % step
        return tensor.as_strided(((size - start - 1) // step + 1,), (step,), tensor.storage_offset() + start).clone()
    left = SAMPLE
    steps: list[int] = []
    for length in tensor.shape:
        taken = max(1, min(length, left, 8 if steps else 32))
        steps.append(max(1, length // taken))
        left = max(1, left // taken)
    sizes = [math.ceil(length / step) for length, step in zip(tensor.shape, steps, strict=True)]
    strides = [stride * step for stride, step in zip(tensor.stride(), steps, strict=True)]
    return tensor.as_strided(sizes, strides, tensor.storage_offset()).flatten().clone()


def _integers(flat: Tensor) -> Tensor:
    """The bits as integers of 32; two for one number of 64 bits, one for two short numbers where they come in pairs."""
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    flat = flat.resolve_neg()
    size = flat.element_size()
    if size >= 4 or (flat.storage_offset() * size % 4 == 0 and flat.numel() * size % 4 == 0 and flat.is_contiguous()):
        return flat.contiguous().view(torch.int32)
    return flat.view(INTEGERS[size]).to(torch.int32)


def _sum(integers: Tensor) -> Tensor:
    rows, columns = _weights(integers.device)
    sums = torch.zeros(4, COLUMNS, dtype=torch.int32, device=integers.device)
    for first in range(0, integers.numel(), ROWS * COLUMNS):
        part = integers[first : first + ROWS * COLUMNS]
        if part.numel() % COLUMNS:
            part = nn.functional.pad(part, (0, -part.numel() % COLUMNS))
        table = part.view(-1, COLUMNS)
        own = rows[:, : len(table)]
        if first:
            sums *= FACTOR
        sums[:2] += _weighted(own, table)
        sums[2:] += _weighted(own, table >> 16)
    return (sums * columns).sum()


def _weighted(weights: Tensor, table: Tensor) -> Tensor:
    """weights @ table, which not every device has for integers."""
    if table.device.type == "cpu":
        return weights @ table
    return torch.stack([(own.unsqueeze(1) * table).sum(0, dtype=torch.int32) for own in weights])


@lru_cache(maxsize=16)
def _weights(device: torch.device) -> tuple[Tensor, Tensor]:
    """Odd pseudo-random numbers, always the same: of 32 bits for the rows, of 64 for the columns."""
    generator = torch.Generator().manual_seed(20_241)
    rows = torch.randint(-(2**31), 2**31, (2, ROWS), generator=generator, dtype=torch.int64).to(torch.int32)
    high, low = torch.randint(-(2**31), 2**31, (2, 4, COLUMNS), generator=generator, dtype=torch.int64)
    return (rows | 1).to(device), ((high << 32) ^ low | 1).to(device)
