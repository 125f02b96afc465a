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

import torch
from torch import Tensor, nn

COLUMNS = 256
ROWS = 512  # at a time, so that the upper halves take little memory
FEW = 2048  # elements, up to which a saved tensor is taken as a whole
SAMPLE = 256  # elements of a larger one
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # two for each number of 64 bits


def checksum(values: Tensor) -> Tensor:
    """A number that changes with any bit and any place of the values, but for about one change in 2^32."""
    return _sum(_integers(values.detach().reshape(-1)))


def comparable(value: object) -> bool:
    """Whether it is an ordinary tensor with data, so that its bits can be compared."""
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not value.is_meta
        and (value.element_size() in INTEGERS or value.is_complex())
        and not value.is_quantized
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
        self._samples: dict[torch.device, list[Tensor]] = {}

    def add(self, tensor: Tensor) -> None:
        """Autograd has saved this tensor."""
        if not comparable(tensor) or _may_be_left_unset(tensor):
            return
        tensor = tensor.detach()
        if self._whole_last:
            self._last = tensor
        self._count += 1
        sample = _integers(_sample(tensor, self._count))
        self._samples.setdefault(tensor.device, []).append(sample.clone())

    def value(self) -> dict[torch.device, Tensor]:
        """The number of what was saved on each device; the samples are gone afterwards."""
        found = {device: _sum(torch.cat(samples)) for device, samples in self._samples.items()}
        if self._last is not None:
            found[self._last.device] += checksum(self._last)
        self._last, self._samples = None, {}
        return found


def _may_be_left_unset(tensor: Tensor) -> bool:
    """Seeds and offsets of attention kernels (set only where they drop), and the work space of recurrent ones."""
    counts = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return tensor.dtype == torch.uint8 or (counts and tensor.numel() <= 2)


def _sample(tensor: Tensor, number: int) -> Tensor:
    """The values that are compared: along memory where the tensor lies there without gaps, else on a lattice."""
    if tensor.numel() <= FEW:
        return tensor.reshape(-1)
    if tensor.is_contiguous():
        step = tensor.numel() // SAMPLE | 1  # odd, so as not to meet the same channel of an even number every time
        start = number * 7919 % step
        count = (tensor.numel() - start - 1) // step + 1
        return torch.as_strided(tensor, (count,), (step,), tensor.storage_offset() + start)
    left = SAMPLE
    steps: list[int] = []
    for size in tensor.shape:
        taken = max(1, min(size, left, 8 if steps else 32))
        steps.append(max(1, size // taken))
        left = max(1, left // taken)
    sizes = [math.ceil(size / step) for size, step in zip(tensor.shape, steps, strict=True)]
    strides = [stride * step for stride, step in zip(tensor.stride(), steps, strict=True)]
    return torch.as_strided(tensor, sizes, strides, tensor.storage_offset()).reshape(-1)


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
    rows = math.ceil(integers.numel() / COLUMNS)
    weights = _weights(2 * rows, integers.device, torch.int32).view(2, rows)
    sums = torch.zeros(4, COLUMNS, dtype=torch.int32, device=integers.device)
    full = integers.numel() // COLUMNS
    table = integers[: full * COLUMNS].view(full, COLUMNS)
    many = ROWS if integers.device.type == "cpu" else max(1, full)
    for first in range(0, full, many):
        part, own = table[first : first + many], weights[:, first : min(first + many, full)]
        sums[:2] += _weighted(own, part)
        sums[2:] += _weighted(own, part >> 16)
    if full < rows:
        rest = integers[full * COLUMNS :].unsqueeze(0)
        sums[:2, : rest.numel()] += weights[:, full:] * rest
        sums[2:, : rest.numel()] += weights[:, full:] * (rest >> 16)
    return (sums.view(-1).to(torch.int64) * _weights(4 * COLUMNS, integers.device, torch.int64)).sum()


def _weighted(weights: Tensor, table: Tensor) -> Tensor:
    """weights @ table, which not every device has for integers."""
    if table.device.type == "cpu":
        return weights @ table
    return torch.stack([(own.unsqueeze(1) * table).sum(0, dtype=torch.int32) for own in weights])


def _weights(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Odd pseudo-random numbers, the same at every call."""
    w = torch.arange(1, count + 1, dtype=dtype, device=device)
    factors = (-1640531535, -2048144789) if dtype == torch.int32 else (-7046029254386353131, -4658895280553007687)
    for factor in factors:
        w = w.mul_(factor)
        w = w.bitwise_xor_(w >> (13 if dtype == torch.int32 else 29))
    return w.mul_(factors[0]) | 1
