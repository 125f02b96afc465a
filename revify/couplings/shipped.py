"""The couplings of the literature: plain functions of streams x1, x2 and branches F, G, written forward only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from revify.couplings.guarding import guarded

Streams = tuple[Tensor, Tensor]
Branch = Callable[[Tensor], Tensor]
PairBranch = Callable[[Tensor], tuple[Tensor, Tensor]]


def additive(x1: Tensor, x2: Tensor, F: Branch, G: Branch) -> Streams:
    """Each stream is shifted by a branch of the other: the reversible block.

    Reference: Gomez et al. 2017, RevNet (arXiv 1707.04585), section 3.1, "Reversible blocks".
    """
    y1 = x1 + F(x2)
    y2 = x2 + G(y1)
    return y1, y2


def swapped(x1: Tensor, x2: Tensor, F: Branch, G: Branch) -> Streams:
    """`additive` with streams that change places.

    Reference: Zhao et al. 2023, Re2TAL (arXiv 2211.14053), "rewiring".
    """
    y1 = x2 + G(x1)
    y2 = x1 + F(y1)
    return y1, y2


def single(x1: Tensor, x2: Tensor, G: Branch) -> Streams:
    """One branch: half of `swapped`, and one step of the recurrence z[k+1] = z[k-1] + g(z[k]).

    Reference: Zhao et al. 2023, Re2TAL (arXiv 2211.14053), "rewiring".
    """
    y1 = x2 + G(x1)
    return y1, x1


def half(x1: Tensor, x2: Tensor, F: Branch) -> Streams:
    """`additive` with G = 0: x2 passes as it is.

    Reference: Dinh et al. 2014, NICE (arXiv 1410.8516), section 3.2, the additive coupling layer.
    """
    y1 = x1 + F(x2)
    return y1, x2


def affine(x1: Tensor, x2: Tensor, F: PairBranch, G: PairBranch) -> Streams:
    """Each stream is scaled and shifted by a branch of the other, which gives the log-scale and the shift.

    tanh bounds the log-scale, so that solving for a stream magnifies no error by more than e. The inverse is
    not exact on the grid. With `ScaleShift` branches the coupling begins as `additive`.

    Reference: Dinh et al. 2017, RealNVP (arXiv 1605.08803), eqs. 4–5; Kingma and Dhariwal 2018, Glow (arXiv
    1807.03039), table 1 and section 3.3 for the zero initialisation.
    """
    s, t = F(x2)
    y1 = x1 * torch.exp(torch.tanh(s)) + t
    s, t = G(y1)
    y2 = x2 * torch.exp(torch.tanh(s)) + t
    return y1, y2


def exponential(x1: Tensor, x2: Tensor, F: Branch, G: Branch) -> Streams:
    """Each stream is scaled by exp(t) and shifted by t, t being a branch of the other: MemCNN's affine coupling.

    The log-scale has no bound: every run looks whether exp(t) stayed a number to divide by. `affine` needs no such look.

    Reference: van de Leemput et al. 2019, MemCNN (doi 10.21105/joss.01576), with its first adapter.
    """
    t = F(x2)
    y1 = x1 * guarded(torch.exp(t)) + t
    t = G(y1)
    y2 = x2 * guarded(torch.exp(t)) + t
    return y1, y2


def glow(x1: Tensor, x2: Tensor, F: PairBranch, G: PairBranch) -> Streams:
    """Each stream is scaled by sigmoid(s + 2) and shifted by t, both of a branch of the other.

    The scale is below 1, so that solving for a stream magnifies errors, and has no lower bound: every run looks whether
    it stayed a number to divide by. `EvenOdd` makes a branch with s and t from one with twice the channels.

    Reference: Kingma and Dhariwal 2018, Glow (arXiv 1807.03039), as its authors' code has it.
    """
    s, t = F(x2)
    y1 = x1 * guarded(torch.sigmoid(s + 2)) + t
    s, t = G(y1)
    y2 = x2 * guarded(torch.sigmoid(s + 2)) + t
    return y1, y2


def damped(x1: Tensor, x2: Tensor, F: Branch, G: Branch, gamma: float = 0.5) -> Streams:
    """`additive` with a gain γ on the old value; another γ is `functools.partial(damped, gamma=0.25)`.

    γ = 2^-b contracts: an exact inverse needs b residue bits for each element, as `determinant.residue_bits`
    says and `revify.runtime.grid` packs. Without them, errors grow by 1/γ per step.

    Reference: Maclaurin et al. 2015 (arXiv 1502.03492) for the bits; Zhao et al. 2024, Dr2Net, for the gain.
    """
    y1 = gamma * x1 + F(x2)
    y2 = gamma * x2 + G(y1)
    return y1, y2


class ScaleShift(nn.Module):
    """A branch of `affine` made of one of `additive`: its value is the shift t, and w·t is the log-scale s.

    The weights w, one per channel, are zero at first: the coupling begins as the additive one, bit for bit.

    Args:
        branch: what gives the shift.
        channels: how many channels that has.
        axis: the axis of the channels: 1 for NCHW, −1 for tokens and NHWC.
    """

    def __init__(self, branch: nn.Module, channels: int, axis: int = 1) -> None:
        super().__init__()
        self.branch, self.axis = branch, axis
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s and t."""
        t = self.branch(x)
        along_channels = [1] * t.ndim
        along_channels[self.axis] = -1
        return self.weight.view(along_channels) * t, t


class EvenOdd(nn.Module):
    """A branch of `affine` or `glow` made of one with twice the channels: the odd ones are s, the even ones t.

    Args:
        branch: what gives 2·c channels where the stream that they are for has c.
        axis: the axis of the channels: 1 for NCHW, −1 for tokens and NHWC.
    """

    def __init__(self, branch: nn.Module, axis: int = 1) -> None:
        super().__init__()
        self.branch, self.axis = branch, axis

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s and t."""
        channels = self.branch(x).movedim(self.axis, -1)
        s, t = channels[..., 1::2], channels[..., 0::2]
        return s.movedim(-1, self.axis), t.movedim(-1, self.axis)
