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
from typing import Any, Protocol

import torch
from torch import Tensor

from revify.errors import StreamError
from revify.runtime.fingerprints import checksum
from revify.runtime.grid import Grid, Sign, step, unstep
from revify.runtime.guards import Peaks, Repeats
from revify.runtime.randomness import Draws
from revify.runtime.replay import version
from revify.runtime.reruns import Rerun
from revify.runtime.torch_internals import is_exporting, is_transforming
from revify.words import BALANCED

_plain: ContextVar[bool] = ContextVar("revify_plain_backward", default=False)


@contextmanager
def plain_backward() -> Iterator[None]:
    """Run converted models in the body under ordinary autograd: same values, all activations saved.

    This is the oracle of revify's own tests, and what a doubtful gradient is to be compared with. It holds in the thread
    that enters it (and in the replicas of nn.DataParallel that are made in it); threads of your own must enter it, too.

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


def is_plain() -> bool:
    """Whether ordinary autograd was asked for, by `plain_backward`."""
    return _plain.get()


def saves_nothing(*values: Any) -> bool:
    """Whether a call made now is to drop what autograd saves: not without gradients, in a plain backward or an export.

    Args:
        values: what the call is given; of tensors without data nothing can be dropped.

    Raises:
        StreamError: a transform of torch.func runs, which takes no hooks on saved tensors.
    """
    without_data = any(isinstance(value, Tensor) and value.is_meta for value in values)
    if not torch.is_grad_enabled() or is_plain() or is_exporting() or without_data:
        return False
    if is_transforming():
        raise StreamError(
            "the transforms of torch.func (vmap, grad, jvp, jacrev, …) cannot go through the memory-free backward of a "
            "converted model. Work under ordinary autograd, `with revify.plain_backward():`, or on revify.revert(model)."
        )
    return True


@dataclass(frozen=True, slots=True)
class StageRule:
    """What the steps of one stage share.

    Args:
        names: the blocks' paths, in order.
        bits: residue bits b of each step; the gain is γ = 2^-b.
        grid: the grid of the stream.
        sign: of γ: "positive"; "balanced", by the pattern; "random" for each sample and step while training, and no
            coupling at all in eval mode.
        pattern: of balanced signs, + and - for the coupled steps, repeated.
        copied: whether the last step hands on a copy, which the model may change in place.
    """

    names: tuple[str, ...]
    bits: tuple[int, ...]
    grid: Grid
    sign: str = "positive"
    pattern: str = BALANCED
    copied: bool = False


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
        index: k.
        coupled: whether z[k-1] had a part in it; the first step after the start, or after a plain block, is T alone.
        block: the step's module and coupling.
        rerun: its second run.
        needs_grad: whether z[k] had a gradient.
        stride: of z[k], which its reconstruction must have too: kernels depend on it.
        checksum: of z[k].
        sign: of γ.
        residue: the packed bits, None where b = 0 or while the tape stands before this step.
    """

    index: int
    coupled: bool
    block: Repeatable
    rerun: Rerun
    needs_grad: bool
    stride: tuple[int, ...]
    checksum: Tensor
    sign: Sign
    residue: Tensor | None = None


class Tape:
    """One forward pass through one stage: able to stand at every pair (z[k], z[k+1]), holding just one.

    Its places are counted by the steps that ran, which may be fewer than the blocks of the stage.
    """

    def __init__(self, rule: StageRule) -> None:
        self.rule = rule
        self._entries: list[Entry] = []
        self._position = 0  # the place of the step that took z[k] to z[k+1]
        self._older: Value | None = None
        self._newer: Value | None = None
        self._first_output: Tensor | None = None  # checksum of T(z) at the first step, behind which nothing is known
        self._loaded: Rerun | None = None
        self._peaks = Peaks(rule.grid)
        self._repeats = Repeats()
        self.draws = Draws()

    # Forward

    def continues(self, index: int) -> bool:
        """Whether what step `index` gave is where the tape stands.

        It is not where that step ran without gradients, nor where a backward (of an auxiliary loss) came in between.
        """
        last = len(self._entries) - 1
        return last < 0 or (self._entries[last].index == index and self._position == last)

    def append(self, z: Tensor, entry: Entry) -> int:
        """A step is about to run on z; returns its place."""
        if not self._entries:
            self._newer = Value(z.detach(), version(z))
        self._entries.append(entry)
        return len(self._entries) - 1

    def advance(self, t: Tensor, value: Tensor, residue: Tensor | None) -> None:
        """The step has given T(z[k]) = t and z[k+1] = value."""
        if len(self._entries) == 1:
            self._first_output = checksum(t)
        self._entries[-1].residue = residue
        self._older, self._newer = self._newer, Value(value.detach(), version(value))
        self._position = len(self._entries) - 1

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

    def load(self, place: int) -> None:
        """Run a step again for its saved tensors, and move the tape one step back."""
        with torch.no_grad():
            self.check_range()
            if self._loaded is not None:
                self._loaded.forget()
            self._wind_to(place)
            self._loaded = self._entries[place].rerun
            self._back(place, catch=True)
        self._repeats.check_in_the_end()

    def _wind_to(self, place: int) -> None:
        while self._position > place:
            self._back(self._position, catch=False)
        while self._position < place:
            self._forth(self._position + 1)

    def _back(self, place: int, *, catch: bool) -> None:
        """From (z[k], z[k+1]) to (z[k-1], z[k]); at the first step the tape stays."""
        entry = self._entries[place]
        older, newer = self._ends()
        forecast, t, late = entry.block.parts_again(entry, older, catch=catch)
        saved = entry.rerun.differs if catch else ()
        if place == 0:
            assert self._first_output is not None  # invariant: the step ran
            differs = checksum(t) != self._first_output if entry.coupled else (newer != t).any()
            self._note(place, differs, *saved)
            return
        gap = unstep(newer, t, entry.residue, self._bits(entry), self.rule.grid, entry.sign)
        del newer, t
        entry.residue = None
        if late is not None:
            gap += late
        gap += forecast
        previous = with_strides(gap, self._entries[place - 1].stride)
        self._newer, self._older = self._older, Value(previous, None)
        self._position = place - 1
        self._note(place, checksum(previous) != self._entries[place - 1].checksum, *saved)

    def _note(self, place: int, returned: Tensor, *saved: Tensor) -> None:
        """Whether a step returned or saved other values than at first, which only finite values can tell."""
        if self._peaks.finite:
            self._repeats.note(self._name(place), returned, *saved)

    def _forth(self, place: int) -> None:
        """From (z[k-1], z[k]) to (z[k], z[k+1]): only a second backward needs this."""
        entry = self._entries[place]
        older, newer = self._ends()
        forecast, t, late = entry.block.parts_again(entry, newer, catch=False)
        gap = older - forecast
        if late is not None:
            gap -= late
        value, entry.residue = step(t, gap, self._bits(entry), self.rule.grid, entry.sign)
        following = self._entries[place + 1] if place + 1 < len(self._entries) else None
        value = with_strides(value, following.stride if following else value.stride())
        self._older, self._newer = self._newer, Value(value, None)
        self._position = place

    def _ends(self) -> tuple[Tensor, Tensor]:
        assert self._older is not None  # invariant: a placeholder exists, so a step ran
        assert self._newer is not None
        older_name = self._name(max(self._position - 1, 0))
        return self._older.checked(older_name), self._newer.checked(self._name(self._position))

    def _name(self, place: int) -> str:
        return self.rule.names[self._entries[place].index]

    def _bits(self, entry: Entry) -> int:
        return self.rule.bits[entry.index]


def with_strides(values: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values, laid out in memory with these strides."""
    if values.stride() == stride:
        return values
    return torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device).copy_(values)
