"""The exact stream: real values → multiples of 2^-q, and a step on them that loses no bit.

On the grid, sums and differences of float32 numbers are exact while |z|·2^q < 2^24, so that

    u = z[k-1] − q(z[k])            exact
    v = floor(u / 2^b)              exact; the residue r = u mod 2^b is kept, b bits per element
    z[k+1] = T(z[k]) + v            exact;  inverse:  u = 2^b (z[k+1] − T(z[k])) + r

Rounding and floor have no useful derivative: gradients pass them straight through, and v counts as γ·u, γ = 2^-b.
Reference: the fixed-point streams with a remainder buffer go back to Maclaurin et al. 2015 (arXiv 1502.03492).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from revify.runtime.torch_internals import is_transforming
from revify.words import SHORT_GRID

Sign = Tensor | float | None  # of γ: ±1 for each sample, ±1, or None for +1


@dataclass(frozen=True, slots=True)
class Grid:
    """The multiples of 2^-resolution.

    Args:
        resolution: q, in bits behind the binary point, 0…40; beyond 20 its points are held in float64.
    """

    resolution: int

    @property
    def scale(self) -> float:
        """Grid points per unit."""
        return 2.0**self.resolution

    @property
    def is_wide(self) -> bool:
        """Whether its points are held in float64, whatever the type of the values."""
        return self.resolution > SHORT_GRID

    def held_in(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which a stream of values of this type is held."""
        return torch.float64 if self.is_wide else stream_dtype(dtype)

    def limit(self, dtype: torch.dtype) -> float:
        """The magnitude below which every grid point is a number of `dtype` (float32 or float64)."""
        return 2.0 / torch.finfo(dtype).eps / self.scale

    def round(self, values: Tensor) -> Tensor:
        """The nearest grid points, in a new tensor that keeps shape and strides, without a gradient.

        There is no −0 among them: the inverse of a step could not tell it from +0.
        """
        with torch.no_grad():
            points = values.to(self.held_in(values.dtype)).mul(self.scale).round_()
            if is_transforming():  # torch.vmap takes no `out=`
                return points.mul_(1 / self.scale).add_(0.0)
            zero = torch.zeros((), dtype=points.dtype, device=points.device)
            return torch.add(zero, points, alpha=1 / self.scale, out=points)


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a stream of values of this type is held in, at least: float64 stays, everything shorter becomes float32."""
    return torch.promote_types(dtype, torch.float32)


class OnGrid(Function):
    """Round to the grid; the gradient passes straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, grid: Grid) -> Tensor:
        return grid.round(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # Any: autograd's have no public type
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class Resume(Function):
    """The stream value of which `shown` is a shorter-typed copy, with the gradient through both.

    The copy is what hooks and wrappers see of a block's output (FSDP waits for its gradient), so it gets the gradient
    as far as its type holds it, and the value gets the rest: together nothing is lost.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(shown: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        limits = torch.finfo(ctx.dtype)
        rounded = grad.clamp(limits.min, limits.max).to(ctx.dtype)
        return rounded, grad - rounded


class Gap(Function):
    """u = z[k-1] − q, whose gradient already carries the γ of the coupling.

    A graph node of its own, created *before* the branch runs: autograd runs later nodes first, so while it works
    through the branch, this node holds only a reference to the incoming gradient, not γ·grad and −γ·grad.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(older: Tensor, forecast: Tensor, bits: int, sign: Sign = None) -> Tensor:
        return older - forecast

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gamma = gain(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad = grad if ctx.gamma is None else grad * ctx.gamma
        return grad, -grad, None, None


class Join(Function):
    """z[k+1] and its residue from t, u and what the forecast adds after the branch; du is left to `Gap`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        t: Tensor, gap: Tensor, late: Tensor | None, bits: int, grid: Grid, sign: Sign = None, keep: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return step(t, gap if late is None else gap - late, bits, grid, sign, keep=keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        ctx.gamma = gain(inputs[3], inputs[5])
        ctx.set_materialize_grads(False)
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None, None
        late = None
        if ctx.needs_input_grad[2]:
            late = -grad if ctx.gamma is None else grad * -ctx.gamma
        return grad, grad, late, None, None, None, None


def random_signs(z: Tensor) -> Tensor:
    """±1 for each sample of z [n, …] as [n, 1, …], from the CPU's random numbers (BDIA, Zhang et al. 2025)."""
    coins = torch.randint(0, 2, (len(z), *(1,) * (z.dim() - 1)))
    return (coins * 2 - 1).to(z)


def balanced_sign(index: int, pattern: str) -> float | None:
    """The sign of coupled step 1, 2, …, from a pattern of + and − that is repeated. None stands for +1."""
    return -1.0 if pattern[(index - 1) % len(pattern)] == "-" else None


def gain(bits: int, sign: Sign) -> Tensor | float | None:
    """γ = ±2^-b, None where that is 1."""
    gamma = 2.0**-bits
    return sign * gamma if sign is not None else gamma if bits else None


def step(
    t: Tensor, gap: Tensor, bits: int, grid: Grid, sign: Sign = None, *, keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """z[k+1] and the packed residue from T(z[k]) and the gap u.

    Args:
        t: T(z[k]) on the grid, any shape.
        gap: u = z[k-1] − q(z[k]) on the grid, same shape.
        bits: b, 0…8.
        grid: the grid of both.
        sign: of γ, ±1, or ±1 for each sample, [n, 1, …]; None for +1.
        keep: whether the residue is needed: no backward without a graph undoes the step.

    Returns:
        z[k+1], same shape, and ceil(b·n/8) bytes (a few more where b is no power of two), or None at 0 bits and where
        the residue is not needed.
        The bytes follow the memory order of t, which the inverse has, too.
    """
    with torch.no_grad():
        if bits == 0:
            return _add(t, gap, sign), None
        points = gap * grid.scale
        kept = points * 2.0**-bits
        kept.floor_()
        if not keep:
            return _add(t, kept.mul_(1 / grid.scale), sign), None
        residue = torch.empty_like(t, dtype=torch.uint8).copy_(points.sub_(kept, alpha=2.0**bits))
        del points
        kept.mul_(1 / grid.scale)
        return _add(t, kept, sign), pack(residue, bits)


def _add(t: Tensor, change: Tensor, sign: Sign) -> Tensor:
    if isinstance(sign, Tensor):
        return torch.addcmul(t, change, sign)
    return torch.add(t, change, alpha=1 if sign is None else sign)


def unstep(value: Tensor, t: Tensor, residue: Tensor | None, bits: int, grid: Grid, sign: Sign = None) -> Tensor:
    """The gap u of `step`, from z[k+1], T(z[k]) and the packed residue."""
    with torch.no_grad():
        gap = value - t
        if sign is not None:
            gap.mul_(sign)
        if residue is not None:
            gap.mul_(2.0**bits).add_(unpack(residue, bits, t), alpha=1 / grid.scale)
        return gap


def pack(residue: Tensor, bits: int) -> Tensor:
    """Numbers 0…2^bits−1, uint8 of any shape, → a flat uint8 tensor with `bits` bits for each."""
    flat = _flat(residue)
    parts, shift = [], 0
    for width in _widths(bits):
        parts.append(_pack_field(flat if width == bits else (flat >> shift) & (2**width - 1), width))
        shift += width
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(packed: Tensor, bits: int, like: Tensor) -> Tensor:
    """The numbers that `pack` was given, uint8, in the shape and strides of `like`."""
    residue = torch.empty_like(like, dtype=torch.uint8)
    flat, start, shift = _flat(residue), 0, 0
    for width in _widths(bits):
        length = -(-flat.numel() * width // 8)
        field = _unpack_field(packed[start : start + length], width)[: flat.numel()]
        if shift:
            flat |= field.bitwise_left_shift_(shift)
        else:
            flat.copy_(field)
        start, shift = start + length, shift + width
    return residue


def _flat(values: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory: the same for every tensor with these strides."""
    return values.as_strided((values.numel(),), (1,))


def _widths(bits: int) -> list[int]:
    """`bits` as a sum of 8, 4, 2, 1: fields of these widths fill bytes without a gap."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def _pack_field(field: Tensor, width: int) -> Tensor:
    """Put 8/width rows of the field over each other: whole rows, since kernels are fast on contiguous memory."""
    per_byte = 8 // width
    missing = -field.numel() % per_byte
    if missing:
        field = torch.nn.functional.pad(field, (0, missing))
    rows = field.view(per_byte, -1)
    packed = rows[0].clone()
    for row in range(1, per_byte):
        packed |= rows[row] << (row * width)
    return packed


def _unpack_field(packed: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    rows = torch.empty(per_byte, packed.numel(), dtype=torch.uint8, device=packed.device)
    for row in range(per_byte):
        torch.bitwise_right_shift(packed, row * width, out=rows[row])
    return rows.bitwise_and_(2**width - 1).view(-1)
