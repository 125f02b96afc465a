"""Determinants: det J of a coupling as a product of pivots, and what that says about an exact inverse.

A pivot of ±1 loses nothing. A pivot of ±2^-b contracts: on the grid of `revify.runtime.grid` its inverse needs just
the b bits per element that it shifts out. Any other pivot rounds, and its inverse magnifies errors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from revify.couplings.intervals import interval
from revify.couplings.programs import Apply, Constant, Op, Program, render
from revify.couplings.solving import Pivot, Solution


@dataclass(frozen=True, slots=True)
class Determinant:
    """det J of a coupling.

    Attributes:
        text: its formula, where n is the number of elements of a stream: 1, (−1)^n, γ^2n, exp(Σ s), …
        odd: whether it is negative for an odd n.
        pivots: each stands for the product of its elements; det J is their product but for the sign.
    """

    text: str
    odd: bool
    pivots: tuple[Pivot, ...]

    def log(self, values: Mapping[str, Tensor]) -> Tensor:
        """log |det J| at the values that `Program.run` gave for the formula or for its inverse."""
        total = next(iter(values.values())).new_zeros(())
        for pivot in self.pivots:
            of = values[pivot.of]
            if isinstance(pivot.factor, Constant):
                total = total + of.numel() * math.log(pivot.smallest)
            else:
                logs = values[pivot.factor].abs().log().expand_as(of)
                total = total + (-logs if pivot.divides else logs).sum()
        return total

    @property
    def residue_bits(self) -> Mapping[str, int]:
        """How many bits per element an exact inverse must keep of each value that contracts by 2^-b: b."""
        shifts = {pivot.of: -math.log2(pivot.smallest) for pivot in self.pivots if _exact(pivot)}
        return {of: int(shift) for of, shift in shifts.items() if shift > 0}

    @property
    def exact(self) -> bool:
        """Whether all pivots are ± powers of two, so that an inverse on the grid loses nothing."""
        return all(map(_exact, self.pivots))

    @property
    def amplification(self) -> float:
        """By how much the inverse magnifies the rounding error of a value it solves through, at most."""
        return max([1.0, *(1 / pivot.smallest for pivot in self.pivots)])


def determinant(forward: Program, solution: Solution) -> Determinant:
    """The determinant of a program whose inverse was found."""
    pivots = tuple(pivot for pivot in solution.pivots if pivot.bounds not in (PLUS_ONE, MINUS_ONE))
    turns = solution.odd + sum(pivot.bounds == MINUS_ONE for pivot in solution.pivots)
    powers: Counter[str] = Counter()
    exponent, products = [], []
    for pivot in pivots:
        if isinstance(pivot.factor, Constant):
            powers[f"(1 / {pivot.factor.text})" if pivot.divides else pivot.factor.text] += 1
        elif logarithm := _logarithm(pivot.factor, forward):
            exponent.append(f"{'−' if pivot.divides else '+'} Σ {logarithm}")
        else:
            text = _closed(render(forward).mentions[pivot.factor])
            products.append(f"Π 1 / {text}" if pivot.divides else f"Π {text}")
    factors = ["(−1)^n"] * (turns % 2)
    factors += [f"{text}^{'n' if power == 1 else f'{power}n'}" for text, power in powers.items()]
    factors += products
    if exponent:
        factors.append(f"exp({' '.join(exponent).removeprefix('+ ')})")
    odd = (turns + sum(pivot.bounds.high < 0 for pivot in pivots)) % 2 == 1
    return Determinant(" · ".join(factors) or "1", odd, pivots)


PLUS_ONE, MINUS_ONE = interval(1.0), interval(-1.0)


def _logarithm(factor: str, forward: Program) -> str:
    """The text of s where the factor is exp(s), or nothing."""
    for step in forward.instructions:
        if isinstance(step, Apply) and step.result == factor and step.op is Op.EXP:
            (exponent,) = step.operands
            return _closed(render(forward).mentions[str(exponent)])
    return ""


def _closed(text: str) -> str:
    """The text, in parentheses where it has several terms."""
    return f"({text})" if " " in text else text


def _exact(pivot: Pivot) -> bool:
    """Whether the pivot is ± a power of two."""
    return isinstance(pivot.factor, Constant) and math.frexp(pivot.smallest)[0] == 0.5
