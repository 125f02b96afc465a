"""An update of the stream → a code of b bits an element, and back.

A stage of coded steps walks on a grid of its own for each sample, of step g, a power of two that follows from the
sample's largest input value. With the update u of a step and groups of about 32 neighbours in memory,

    m = max(1, ⌈max |u| / ((2^(b-1) − 1) g)⌉)      an integer of 8 significant bits for each group
    c = round(u / m g)                             an integer of b bits for each element, |c| < 2^(b-1)
    z[k+1] = z[k] + m g c                          a multiple of g again
    z[k] = z[k+1] − m g c                          exact, as long as the values stay below 2^24 g

Nothing here couples samples: groups lie within one sample (an index of the first dimension), and so does g.
Reference: error feedback of what a code leaves out goes back to Seide et al. 2014, "1-bit SGD"; scales for groups of
neighbours are those of block floating point (the MX formats, Rouhani et al. 2023, arXiv 2310.10537).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from revify.runtime.grid import pack, stream_dtype, unpack

MIN_BITS, MAX_BITS = 2, 8
GROUP = 32  # elements that share a scale, where the size of a sample allows it
HEADROOM = 8  # in bits: a stream may grow to 2^8 times its first magnitude before the subtraction is no longer exact
SMALLEST = -64  # exponent of the finest grid, for samples that begin with zeros
SCALE_DTYPE = torch.bfloat16  # 8 significant bits; from 128 on these are whole numbers, as all below can be


@dataclass(frozen=True, slots=True)
class Code:
    """The code of one update.

    Args:
        values: c, packed to b bits an element.
        scales: m for each group, [samples, groups, 1].
    """

    values: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class Frame:
    """How a stream is parted into groups.

    Args:
        shape: of the stream.
        stride: of its values: dense, the first dimension outermost.
        samples: n, the size of the first dimension; 1 where there is no other.
        elements: of one sample.
        group: how many elements share a scale.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    samples: int
    elements: int
    group: int

    @classmethod
    def of(cls, x: Tensor) -> Frame:
        """The frame of a stream that begins with x, in the memory order of x where that keeps samples apart."""
        samples = x.shape[0] if x.dim() > 1 else 1
        elements = x.numel() // max(samples, 1)
        stride = x.stride() if _is_dense(x) and _samples_outermost(x) else _contiguous(x.shape)
        return cls(x.shape, stride, samples, elements, group_size(elements))

    @property
    def groups(self) -> int:
        """How many groups a sample has."""
        return -(-self.elements // self.group)

    def flat(self, values: Tensor) -> Tensor:
        """Values with the frame's strides as [samples, elements], sharing their memory."""
        return values.as_strided((self.samples, self.elements), (self.elements, 1))

    def shaped(self, flat: Tensor) -> Tensor:
        """The reverse of `flat`, sharing its memory."""
        return flat.as_strided(self.shape, self.stride)

    def grouped(self, flat: Tensor) -> Tensor:
        """[samples, elements] → [samples, groups, group]: a view, or a copy filled up with zeros where groups do not fit."""
        missing = self.groups * self.group - self.elements
        if missing:
            flat = functional.pad(flat, (0, missing))
        return flat.view(self.samples, self.groups, self.group)

    def ungrouped(self, rows: Tensor) -> Tensor:
        """The reverse of `grouped`: [samples, elements], dense."""
        flat = rows.view(self.samples, self.groups * self.group)
        return flat if flat.shape[1] == self.elements else flat[:, : self.elements].contiguous()


def group_size(elements: int) -> int:
    """The divisor of a sample's size that is nearest to 32, from 16 to 64; 32 where there is none."""
    sizes = [size for size in range(GROUP // 2, 2 * GROUP + 1) if elements % size == 0]
    return min(sizes, key=lambda size: (abs(size - GROUP), size), default=GROUP)


def code_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of the code of one update of a stream of this shape, scales included."""
    samples = shape[0] if len(shape) > 1 else 1
    elements = math.prod(shape) // max(samples, 1)
    group = group_size(elements)
    groups = -(-elements // group)
    coded = samples * groups * group
    fields = [width for width in (8, 4, 2, 1) if bits & width]
    return sum(-(-coded * width // 8) for width in fields) + samples * groups * SCALE_DTYPE.itemsize


@dataclass(frozen=True, slots=True)
class Running:
    """A stream on its way through a stage, in forward.

    Args:
        z: z[k], multiples of g, in the frame's strides and the type that streams are held in.
        error: e[k], likewise, what the codes so far left out; the next step works in its memory.
        g: step of each sample's grid, [samples, 1].
        far: how far its values can have gone, in units of g, [samples, 1].
        frame: of the stream.
    """

    z: Tensor
    error: Tensor
    g: Tensor
    far: Tensor
    frame: Frame

    @classmethod
    def of(cls, x: Tensor) -> Running:
        """A stream that begins with x, of any floating-point type; e[0] = 0, since the first block is given x itself."""
        frame = Frame.of(x)
        with torch.no_grad():
            error = torch.empty_strided(frame.shape, frame.stride, dtype=stream_dtype(x.dtype), device=x.device).copy_(
                x
            )
            left = frame.flat(error)
            largest = _largest(left) if left.numel() else left.new_zeros(frame.samples, 1)
            digits = exact_digits(left.dtype)
            exponent = torch.frexp(largest).exponent.clamp_(SMALLEST + digits - HEADROOM, -SMALLEST)
            g = torch.ldexp(torch.ones_like(largest), exponent + (HEADROOM - digits))
            z = (left / g).round_().mul_(g).add_(0.0)  # + 0 leaves no −0, which a subtraction could not give back
            left.zero_()
            return cls(frame.shaped(z), error, g, largest / g, frame)

    def stepped(self, t: Tensor, bits: int) -> tuple[Running, Code]:
        """The stream after a block has given T(z[k]) = t, and the code of the step; this one's error is used up.

        Args:
            t: of the shape of the stream and any floating-point type.
            bits: b, 2…8.
        """
        with torch.no_grad():
            update = self.error.add_(t).sub_(self.z)
            z, code = encode(self.z, update, self.g, bits, self.frame)
            return Running(z, update, self.g, self.far + _reach(code, bits), self.frame), code

    def without_values(self) -> Running:
        """The same, but for the values: what a tape may hold."""
        nothing = self.g.new_empty(0)
        return replace(self, z=nothing, error=nothing)

    @property
    def subtracts(self) -> Tensor:
        """One truth value: whether all values so far are such that subtracting what was added gives them back."""
        return (self.far < 2.0 ** exact_digits(self.g.dtype)).all()


def exact_digits(dtype: torch.dtype) -> int:
    """The number of bits of a whole number that `dtype` holds exactly: 24 or 53."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def encode(z: Tensor, u: Tensor, g: Tensor, bits: int, frame: Frame) -> tuple[Tensor, Code]:
    """One step: z[k+1] and the code of the update.

    Args:
        z: z[k], multiples of g, in the frame's strides.
        u: T(z[k]) − z[k] + e[k], likewise; in its place e[k+1] = u − m g c, what the code leaves out.
        g: step of the grid of each sample, [samples, 1].
        bits: b, 2…8.
        frame: of the stream.

    Returns:
        z[k+1] in the frame's strides, and the code. Where u is not finite, so is the whole group of z[k+1].
    """
    with torch.no_grad():
        left = frame.flat(u)
        rows = frame.grouped(left)
        largest = 2 ** (bits - 1) - 1
        step = g.unsqueeze(-1)
        scales = _largest(rows).div_(step * largest).ceil_().clamp_min_(1).to(SCALE_DTYPE)
        scale = scales * step
        change = rows / scale
        change.round_()
        values = change.to(torch.int8)
        change.copy_(values).mul_(scale)  # as `decode` does, so that what is not finite has the same bits, too
        change = frame.ungrouped(change)
        left.sub_(change)
        change.add_(frame.flat(z))
        return frame.shaped(change), Code(_packed(values, bits), scales)


def decode(code: Code, g: Tensor, bits: int, frame: Frame) -> Tensor:
    """m g c of a code, in the frame's strides and the type of g."""
    with torch.no_grad():
        scale = code.scales * g.unsqueeze(-1)
        values = _unpacked(code.values, bits, (frame.samples, frame.groups, frame.group))
        return frame.shaped(frame.ungrouped(values.to(scale.dtype).mul_(scale)))


def _reach(code: Code, bits: int) -> Tensor:
    """How far one step can move a value of each sample, in units of g: [samples, 1]."""
    if not code.scales.numel():
        return code.scales.new_zeros(len(code.scales), 1).float()
    return code.scales.amax(dim=1).float() * (2 ** (bits - 1) - 1)


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude in each row, [..., 1]; on a CPU ten times as fast as the norm of this name."""
    return torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_())


def _packed(values: Tensor, bits: int) -> Tensor:
    if bits == MAX_BITS:
        return values
    return pack(values.add_(2 ** (bits - 1)).view(torch.uint8), bits)


def _unpacked(values: Tensor, bits: int, shape: tuple[int, int, int]) -> Tensor:
    if bits == MAX_BITS:
        return values
    like = torch.empty(shape, dtype=torch.uint8, device=values.device)
    return unpack(values, bits, like).view(torch.int8).sub_(2 ** (bits - 1))


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _samples_outermost(x: Tensor) -> bool:
    return x.dim() < 2 or x.shape[0] <= 1 or x.stride(0) == x.numel() // x.shape[0]
