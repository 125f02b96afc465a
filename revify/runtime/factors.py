"""The factors by which an inverse divides: whether those that a formula marks (`guarded`) stayed numbers to divide by."""

from __future__ import annotations

import torch
from torch import Tensor

from revify.couplings.intervals import LARGEST, SMALLEST
from revify.errors import StreamError


class Factors:
    """The extremes of the marked factors of one pass, looked at late, since reading a number makes a device wait."""

    def __init__(self) -> None:
        self._extremes: list[tuple[str, Tensor]] = []

    def note(self, name: str, factor: Tensor) -> None:
        """Note a factor of the layer of this name."""
        if factor.numel():
            self._extremes.append((name, torch.stack(torch.aminmax(factor.detach().abs())).float()))

    def check(self) -> None:
        """Refuse to divide by what is zero, too small or too large, or no number."""
        if not self._extremes:
            return
        extremes = torch.stack([found for _, found in self._extremes]).tolist()
        names = [name for name, _ in self._extremes]
        self._extremes.clear()
        for name, (least, most) in zip(names, extremes, strict=True):
            if not (least >= SMALLEST and most <= LARGEST):
                raise StreamError(
                    f"{name}: a factor of its coupling reached {least if most <= LARGEST else most:.3g}, and an inverse "
                    "cannot divide by that. Keep the log-scales small (begin the branch's last layer at zero, decay its "
                    "weights), or use revify.couplings.affine, whose log-scales lie between −1 and 1."
                )
