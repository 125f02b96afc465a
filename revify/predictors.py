"""Predictors: q(z[k]) ≈ z[k-1], the forecast whose error γ scales into the next value.

A forecast is q = a(z[k]) + c(T(z[k])), in two parts: the part known before the branch runs, and the part that also
looks at the branch's output. Both are grid values with a gradient.

    identity   q = z            Re2TAL, Rev-ViT, Reformer at γ = 1
    midpoint   q = 2z − T(z)    leapfrog at γ = 1; BDIA at γ = ±1/2
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Predictor(Protocol):
    """A forecast of the previous stream value."""

    def before(self, z: Tensor) -> Tensor:
        """a(z[k]): grid values, the shape of z."""

    def after(self, t: Tensor) -> Tensor | None:
        """c(T(z[k])): grid values of the same shape, or None where the forecast does not look at T."""


class Identity:
    """q(z) = z: the blocks change the stream little (Re2TAL, Zhao et al. 2023, eq. 4)."""

    def before(self, z: Tensor) -> Tensor:
        return z

    def after(self, t: Tensor) -> Tensor | None:
        return None


class Midpoint:
    """q(z) = 2z − T(z): the blocks change it by about the same amount twice (leapfrog; BDIA, Zhang et al. 2025)."""

    def before(self, z: Tensor) -> Tensor:
        return 2 * z

    def after(self, t: Tensor) -> Tensor | None:
        return -t


PREDICTORS: dict[str, type[Identity] | type[Midpoint]] = {"identity": Identity, "midpoint": Midpoint}
