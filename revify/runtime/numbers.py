"""How the streams of a coupling are held: on the grid, where an inverse gives the same bits, or as floats.

On the grid, sums of grid values stay on it and are exact; what a branch gives, or a product by a number, is rounded to
it; and a product by ±2^-b that the inverse has to undo keeps the b bits that it shifts out (`stream.step`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from revify.couplings.deriving import Coupling
from revify.couplings.programs import Apply, Constant, Op
from revify.runtime.grid import Grid, OnGrid, step, stream_dtype, unstep

SUMS = (Op.ADD, Op.SUBTRACT)


def is_exact(coupling: Coupling) -> bool:
    """Whether its inverse gives the same bits on the grid: sums, and products whose bits are kept or computed again."""
    if not coupling.determinant.exact:
        return False
    products = {}
    for instruction in coupling.forward.instructions:
        if isinstance(instruction, Apply) and instruction.op not in (*SUMS, Op.SAME, Op.NEGATE):
            if _factor(instruction) is None:
                return False
            products[instruction.result] = instruction
    kept = coupling.determinant.residue_bits
    recomputed = set(coupling.inverse.instructions)
    undone = [p for p in products.values() if p.result not in kept and p not in recomputed]
    return kept.keys() <= products.keys() and all(float(_factor(p) or 0).is_integer() for p in undone)


def common_grid(couplings: Iterable[Coupling], resolution: int) -> Grid | None:
    """The grid for a sequence of couplings, None unless all of them are exact on it."""
    return Grid(resolution) if all(map(is_exact, couplings)) else None


@dataclass(frozen=True, slots=True)
class Numbers:
    """How the values of one forward pass are held.

    Args:
        grid: where they lie; None for floats.
        branch_dtype: in which type a branch is given them.
    """

    grid: Grid | None
    branch_dtype: torch.dtype

    def held(self, value: Tensor) -> Tensor:
        """A value from outside, or of a branch, as a stream value."""
        if self.grid is None:
            return value.to(stream_dtype(value.dtype))
        held: Tensor = OnGrid.apply(value, self.grid)
        return held

    def bits(self, coupling: Coupling) -> Mapping[str, int]:
        """How many bits are kept of which values."""
        return {} if self.grid is None else coupling.determinant.residue_bits

    def apply(self, instruction: Apply, values: Mapping[str, Tensor]) -> Tensor:
        """The result of an operation that loses nothing, or whose loss is redone by the inverse."""
        op, grid = instruction.op, self.grid
        operands = [values[o] if isinstance(o, str) else self._number(o, op) for o in instruction.operands]
        result: Tensor = op.compute(*operands)
        if grid is None or op in SUMS or op is Op.SAME:
            return result
        rounded: Tensor = OnGrid.apply(result, grid)  # NEGATE, too: it makes a −0
        return rounded

    def contract(self, instruction: Apply, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A product by ±2^-b, rounded down to the grid, and the packed b bits of each element."""
        (name,) = (operand for operand in instruction.operands if isinstance(operand, str))
        factor, grid = _factor(instruction), self.grid
        assert factor is not None  # by `is_exact`
        assert grid is not None
        value, residue = Contract.apply(values[name], factor, grid)
        return value, residue

    def expand(self, instruction: Apply, values: Mapping[str, Tensor], residue: Tensor, bits: int) -> Tensor:
        """What `contract` was given, from its results and the inverse's instruction."""
        factor, grid = _factor(instruction), self.grid
        assert factor is not None  # the inverse of such a product is one
        assert grid is not None
        value = values[str(instruction.undoes)]
        expanded: Tensor = Expand.apply(value, residue, bits, factor, grid)
        return expanded

    def _number(self, constant: Constant, op: Op) -> float:
        if self.grid is None or op not in SUMS:
            return constant.value
        return round(constant.value * self.grid.scale) / self.grid.scale


class Contract(Function):
    """Multiply by ±2^-b and round down to the grid, with the gradient of the product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, factor: float, grid: Grid) -> tuple[Tensor, Tensor]:
        gap = value if factor > 0 else -value
        result, residue = step(torch.zeros_like(gap), gap, _bits(factor), grid)
        assert residue is not None  # b > 0
        return result, residue

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.factor = inputs[1]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


class Expand(Function):
    """Undo `Contract`; the factor is that of the inverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, residue: Tensor, bits: int, factor: float, grid: Grid) -> Tensor:
        gap = unstep(value, torch.zeros_like(value), residue, bits, grid)
        return gap if factor > 0 else 0 - gap

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad * ctx.factor, None, None, None, None


def _factor(instruction: Apply) -> float | None:
    """By what an operation multiplies its one value, or None if it does not multiply by a number."""
    values = [operand for operand in instruction.operands if isinstance(operand, str)]
    divides_by_value = instruction.op is Op.DIVIDE and isinstance(instruction.operands[-1], str)
    if len(values) != 1 or instruction.op not in (Op.MULTIPLY, Op.DIVIDE) or divides_by_value:
        return None
    return float(instruction.op.compute(*(1.0 if isinstance(o, str) else o.value for o in instruction.operands)))


def _bits(factor: float) -> int:
    bits = 0
    while abs(factor) < 1:
        factor, bits = factor * 2, bits + 1
    return bits
