"""Intervals: where the values of a formula can lie, to tell a factor that can be zero from one that cannot.

An `Interval` has +, −, ·, /, exp, tanh, sigmoid like a tensor, so running a formula on intervals bounds all
its values. The ends are rounded to nearest, not outwards: they are float64, and judge factors of float32.
Reference: Moore 1966, Interval Analysis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMALLEST, LARGEST = 2.0**-126, 2.0**127  # normal numbers of float32 and of bfloat16 alike


@dataclass(frozen=True, slots=True)
class Interval:
    """All numbers from `low` to `high`; the ends may be infinite."""

    low: float
    high: float

    @property
    def invertible(self) -> bool:
        """Whether float32 can divide by every number in it: none is zero, none under- or overflows."""
        return any(side.low >= SMALLEST and side.high <= LARGEST for side in (self, -self))

    def __add__(self, other: Interval | float) -> Interval:
        other = interval(other)
        return _hull(self.low + other.low, self.high + other.high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __sub__(self, other: Interval | float) -> Interval:
        return self + -interval(other)

    def __rsub__(self, other: float) -> Interval:
        return -self + other

    def __mul__(self, other: Interval | float) -> Interval:
        other = interval(other)
        ends = [(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return _hull(*(a * b if a and b else 0.0 for a, b in ends))  # 0·∞ = 0: an end at ∞ is never reached

    def __truediv__(self, other: Interval | float) -> Interval:
        return self * interval(other).reciprocal()

    def __rtruediv__(self, other: float) -> Interval:
        return self.reciprocal() * other

    __radd__, __rmul__ = __add__, __mul__

    def reciprocal(self) -> Interval:
        """1/v for every v in it: the whole line where it holds zero."""
        return LINE if self.low <= 0 <= self.high else Interval(1 / self.high, 1 / self.low)

    def guarded(self) -> Interval:
        """What is left of it where a run looks that its numbers are neither zero nor too small or large to divide by."""
        if self.low < 0:
            return self if self.high > 0 else -(-self).guarded()
        return Interval(max(self.low, SMALLEST), min(self.high, LARGEST)) if self.high > 0 else self

    def exp(self) -> Interval:
        return Interval(_exp(self.low), _exp(self.high))

    def tanh(self) -> Interval:
        return Interval(math.tanh(self.low), math.tanh(self.high))

    def sigmoid(self) -> Interval:
        return Interval(1 / (1 + _exp(-self.low)), 1 / (1 + _exp(-self.high)))

    def __str__(self) -> str:
        return f"{_end(self.low)} … {_end(self.high)}"


LINE = Interval(-math.inf, math.inf)


def interval(value: Interval | float) -> Interval:
    """The value itself, or the single point of a number."""
    return value if isinstance(value, Interval) else Interval(value, value)


def _hull(*ends: float) -> Interval:
    return LINE if any(map(math.isnan, ends)) else Interval(min(ends), max(ends))


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _end(value: float) -> str:
    return f"{value:.3g}".replace("inf", "∞").replace("-", "−")
