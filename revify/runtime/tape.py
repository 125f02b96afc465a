"""The memory-free backward: one tape per forward pass, wound back while autograd works.

Forward. Step k of a stage runs its block under hooks that drop what autograd saves (`reruns`), and adds the coupling on
the grid (`stream`). The tape keeps the two newest stream values and the packed residues, nothing else.

Backward. When autograd first needs a dropped tensor of step k, the tape stands at (z[k], z[k+1]), or is wound there;
the block runs again on z[k], which gives its saved tensors and T(z[k]), and so, by the inverse, z[k-1]; the tape now
stands at (z[k-1], z[k]). At the start of the stage the reconstructed input must be the one that came in, bit for bit.

Blocks find the tape by the tensor they are given (`links`); what they compute is in `steps`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from revify.errors import StreamError
from revify.runtime.grid import Grid, Sign, step, unstep
from revify.runtime.guards import Peaks, Repeats, checksum
from revify.runtime.replay import version
from revify.runtime.reruns import Rerun

_plain: ContextVar[bool] = ContextVar("revify_plain_backward", default=False)


@contextmanager
def plain_backward() -> Iterator[None]:
    """Run converted models in the body under ordinary autograd: same values, all activations saved.

    This is the oracle of revify's own tests, and what a doubtful gradient is to be compared with.

    Example:
        >>> import timm, torch, revify
        >>> model = revify.convert(timm.create_model("test_vit"))
        >>> with revify.plain_backward():
        ...     model(torch.randn(2, 3, 160, 160)).sum().backward()
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def saves_nothing() -> bool:
    """Whether a call made now is to drop what autograd saves: not without gradients, not in a plain backward."""
    return torch.is_grad_enabled() and not _plain.get()


@dataclass(frozen=True, slots=True)
class StageRule:
    """What the steps of one stage share.

    Args:
        names: the blocks' paths, in order.
        bits: residue bits b of each step; the gain is γ = 2^-b.
        grid: the grid of the stream.
        sign: of γ: "positive"; "balanced", + − − + + over the steps; "random" for each sample and step while training, and
            no coupling at all in eval mode.
    """

    names: tuple[str, ...]
    bits: tuple[int, ...]
    grid: Grid
    sign: str = "positive"


@dataclass(slots=True)
class Value:
    """One stream value on the tape; `version` is None once the value is private (reconstructed)."""

    values: Tensor
    version: int | None

    def checked(self, name: str) -> Tensor:
        if self.version is not None and version(self.values) != self.version:
            raise StreamError(
                f"the output of {name} was changed in place after the block had returned it; the inputs before it "
                "cannot be reconstructed from the changed values. Use the out-of-place operation, or clone() first."
            )
        return self.values


class Repeatable(Protocol):
    """A step, as far as the tape needs it."""

    def parts_again(self, entry: Entry, z: Tensor, *, catch: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """a(z[k]), T(z[k]) and c(T(z[k])) once more, without a graph."""


@dataclass(slots=True)
class Entry:
    """What the tape keeps of step k.

    Args:
        block: the step's module and coupling.
        rerun: its second run.
        needs_grad: whether z[k] had a gradient.
        stride: of z[k], which its reconstruction must have too: kernels depend on it.
        checksum: of z[k].
        sign: of γ.
        residue: the packed bits, None where b = 0 or while the tape stands before this step.
    """

    block: Repeatable
    rerun: Rerun
    needs_grad: bool
    stride: tuple[int, ...]
    checksum: Tensor
    sign: Sign
    residue: Tensor | None = None


class Tape:
    """One forward pass through one stage: able to stand at every pair (z[k], z[k+1]), holding just one."""

    def __init__(self, rule: StageRule) -> None:
        self.rule = rule
        self._entries: dict[int, Entry] = {}
        self._first = 0  # the first step that ran with gradients enabled
        self._position = 0  # k of (z[k], z[k+1])
        self._older: Value | None = None
        self._newer: Value | None = None
        self._first_output: Tensor | None = None  # checksum of T(z) at the first step, behind which nothing is known
        self._loaded: Rerun | None = None
        self._peaks = Peaks(rule.grid)
        self._repeats = Repeats()

    # Forward

    def continues_at(self, index: int) -> bool:
        """Whether step `index` follows on what was recorded: not after blocks that ran without gradients."""
        return not self._entries or index - 1 in self._entries

    def append(self, index: int, z: Tensor, entry: Entry) -> None:
        """Step `index` is about to run on z."""
        if not self._entries:
            self._first = index
            self._newer = Value(z.detach(), version(z))
        self._entries[index] = entry

    def advance(self, index: int, t: Tensor, value: Tensor, residue: Tensor | None) -> None:
        """Step `index` has given T(z[index]) = t and z[index+1] = value."""
        if index == self._first:
            self._first_output = checksum(t)
        self._entries[index].residue = residue
        self._older, self._newer = self._newer, Value(value.detach(), version(value))
        self._position = index

    def enter(self, x: Tensor) -> None:
        """Note what enters the stage."""
        self._peaks.enter(self.rule.names[0], x)

    def observe(self, index: int, *values: Tensor) -> None:
        """Note how far step `index` went out on the grid."""
        self._peaks.observe(self.rule.names[index], *values)

    def check_range(self) -> None:
        """Refuse finite values outside of the range where the grid is exact."""
        self._peaks.check()

    # Backward

    def load(self, index: int) -> None:
        """Run step `index` again for its saved tensors, and move the tape one step back."""
        with torch.no_grad():
            self.check_range()
            if self._loaded is not None:
                self._loaded.forget()
            self._wind_to(index)
            self._loaded = self._entries[index].rerun
            self._back(index, catch=True)
        self._repeats.check_in_the_end()

    def _wind_to(self, index: int) -> None:
        while self._position > index:
            self._back(self._position, catch=False)
        while self._position < index:
            self._forth(self._position + 1)

    def _back(self, index: int, *, catch: bool) -> None:
        """From (z[k], z[k+1]) to (z[k-1], z[k]), k = index; at the first step the tape stays."""
        entry = self._entries[index]
        older, newer = self._ends()
        forecast, t, late = entry.block.parts_again(entry, older, catch=catch)
        if index == self._first:
            assert self._first_output is not None  # invariant: the step ran
            self._note(index, (newer != t).any() if index == 0 else checksum(t) != self._first_output)
            return
        gap = unstep(newer, t, entry.residue, self.rule.bits[index], self.rule.grid, entry.sign)
        del newer, t
        entry.residue = None
        if late is not None:
            gap += late
        gap += forecast
        previous = with_strides(gap, self._entries[index - 1].stride)
        self._newer, self._older = self._older, Value(previous, None)
        self._position = index - 1
        self._note(index, checksum(previous) != self._entries[index - 1].checksum)

    def _note(self, index: int, differs: Tensor) -> None:
        """Whether step `index` did not repeat itself, which only finite values can tell."""
        if self._peaks.finite:
            self._repeats.note(self.rule.names[index], differs)

    def _forth(self, index: int) -> None:
        """From (z[k-1], z[k]) to (z[k], z[k+1]), k = index: only a second backward needs this."""
        entry = self._entries[index]
        older, newer = self._ends()
        forecast, t, late = entry.block.parts_again(entry, newer, catch=False)
        gap = older - forecast
        if late is not None:
            gap -= late
        value, entry.residue = step(t, gap, self.rule.bits[index], self.rule.grid, entry.sign)
        following = self._entries.get(index + 1)
        value = with_strides(value, following.stride if following else value.stride())
        self._older, self._newer = self._newer, Value(value, None)
        self._position = index

    def _ends(self) -> tuple[Tensor, Tensor]:
        assert self._older is not None  # invariant: a placeholder exists, so a step ran
        assert self._newer is not None
        older_name = self.rule.names[max(self._position - 1, 0)]
        return self._older.checked(older_name), self._newer.checked(self.rule.names[self._position])


def with_strides(values: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values, laid out in memory with these strides."""
    if values.stride() == stride:
        return values
    return torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device).copy_(values)
