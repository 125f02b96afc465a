"""Factors whose formula alone does not keep them away from 0 and ∞: marked in the formula, and looked at in every run."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def guarded(factor: Tensor) -> Tensor:
    """The factor itself, marked to be looked at in every run, so that a formula may divide by it.

    exp(s) and sigmoid(s) are never 0 on paper, but they are in floats where s is far from 0. A formula that multiplies
    a stream by one of them has an inverse only where they stay normal numbers: `Reversible` looks whether they did, and
    a backward or an inverse that had to divide by another one ends in an error.

        >>> import torch
        >>> from revify.couplings import derive
        >>> def scaled(x1, x2, F):
        ...     s, t = F(x2)
        ...     return x1 * guarded(torch.exp(s)) + t, x2
        >>> print(derive(scaled).determinant.text)
        exp(Σ s)

    Args:
        factor: of one sign, whatever the branches give.
    """
    if has_torch_function_unary(factor):  # a symbol, while the formula is read
        marked: Tensor = handle_torch_function(guarded, (factor,), factor)
        return marked
    return factor
