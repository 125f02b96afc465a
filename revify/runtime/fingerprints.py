"""Numbers that say whether a second run gave the bits of the first: of one tensor, and of all that autograd saved.

A checksum sees the values' bits as a table of 32-bit integers. Each row and each column is summed up modulo 2^32, and these
sums are added up with odd pseudo-random weights of 64 bits, those of the rows twice. One changed integer always changes
the number: W d + 2 V d is no multiple of 2^32 for any odd W and any d that is none. Of two changes (a flip and its
opposite, a swap) the sums of a row or of a column see at least one, so that they cancel with a probability of about 2^-32,
and so do permutations; what no sum sees are four changes of the same size at the corners of a rectangle, two of each sign.

Nothing here reads a number from a device: what is compared stays there until the end of the backward.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

COLUMNS = 256
ROWS = 4096  # that have weights of their own; of more, each so many are first added up
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
    ends = integers.numel() // COLUMNS * COLUMNS
    table = integers[:ends].view(-1, COLUMNS)
    columns, rows = table.sum(0, dtype=torch.int32), table.sum(1, dtype=torch.int32)
    if ends < integers.numel():
        rest = nn.functional.pad(integers[ends:], (0, COLUMNS - integers.numel() + ends))
        columns, rows = columns + rest, torch.cat([rows, rest.sum(0, True, dtype=torch.int32)])
    of_columns, of_rows, of_thousands = _weights(integers.device)
    return (columns * of_columns).sum() + 2 * _weighted(rows, of_rows, of_thousands)


def _weighted(rows: Tensor, weights: Tensor, of_thousands: Tensor) -> Tensor:
    if len(rows) <= ROWS:
        return (rows * weights[: len(rows)]).sum()
    thousands = nn.functional.pad(rows, (0, -len(rows) % ROWS)).view(-1, ROWS)
    return ((thousands * weights).sum(1) * of_thousands[: len(thousands)]).sum()


@lru_cache(maxsize=16)
def _weights(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Odd pseudo-random numbers of 64 bits, always the same: for the columns, the rows, and each ROWS rows."""
    generator = torch.Generator().manual_seed(20_241)
    high, low = torch.randint(-(2**31), 2**31, (2, COLUMNS + 2 * ROWS), generator=generator, dtype=torch.int64)
    columns, rows, thousands = ((high << 32) ^ low | 1).to(device).split([COLUMNS, ROWS, ROWS])
    return columns, rows, thousands
