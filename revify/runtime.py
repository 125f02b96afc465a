"""The memory-free backward: one tape per forward pass, wound back while autograd works.

Forward. Step k of a stage runs its block under hooks that drop what autograd saves (`reruns`), and adds the coupling on
the grid (`stream`). The tape keeps the two newest stream values and the packed residues, nothing else.

Backward. When autograd first needs a dropped tensor of step k, the tape stands at (z[k], z[k+1]), or is wound there;
the block runs again on z[k], which gives its saved tensors and T(z[k]), and so, by the inverse, z[k-1]; the tape now
stands at (z[k-1], z[k]). At the start of the stage the reconstructed input must be the one that came in, bit for bit.

A block finds its stream by the tensor it is given (`links`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revify.compiling import hidden_from_compiler
from revify.errors import StreamError
from revify.guards import Peaks, Repeats, checksum
from revify.links import Link, split_stream, take_link
from revify.predictors import Predictor
from revify.replay import SideInputs, version
from revify.reruns import Rerun
from revify.stream import Gap, Grid, Join, OnGrid, Resume, step, unstep

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
        bits: residue bits b; the gain is γ = 2^-b.
        grid: the grid of the stream.
        random_sign: γ = ±2^-b at random for each sample and step while training, and no coupling at all in eval mode.
    """

    names: tuple[str, ...]
    bits: int
    grid: Grid
    random_sign: bool = False


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


@dataclass(slots=True)
class Entry:
    """What the tape keeps of step k.

    Args:
        block: the step's module and coupling.
        rerun: its second run.
        needs_grad: whether z[k] had a gradient.
        stride: of z[k], which its reconstruction must have too: kernels depend on it.
        checksum: of z[k].
        sign: of γ for each sample, None where it is always +1.
        residue: the packed bits, None where b = 0 or while the tape stands before this step.
    """

    block: Step
    rerun: Rerun
    needs_grad: bool
    stride: tuple[int, ...]
    checksum: Tensor
    sign: Tensor | None
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
        """Refuse values outside of the range where the grid is exact."""
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
            differs = (newer != t).any() if index == 0 else checksum(t) != self._first_output
            self._repeats.note(self.rule.names[index], differs)
            return
        gap = unstep(newer, t, entry.residue, self.rule.bits, self.rule.grid, entry.sign)
        del newer, t
        entry.residue = None
        if late is not None:
            gap += late
        gap += forecast
        previous = with_strides(gap, self._entries[index - 1].stride)
        self._newer, self._older = self._older, Value(previous, None)
        self._position = index - 1
        self._repeats.note(self.rule.names[index], checksum(previous) != self._entries[index - 1].checksum)

    def _forth(self, index: int) -> None:
        """From (z[k-1], z[k]) to (z[k], z[k+1]), k = index: only a second backward needs this."""
        entry = self._entries[index]
        older, newer = self._ends()
        forecast, t, late = entry.block.parts_again(entry, newer, catch=False)
        gap = older - forecast
        if late is not None:
            gap -= late
        value, entry.residue = step(t, gap, self.rule.bits, self.rule.grid, entry.sign)
        following = self._entries.get(index + 1)
        value = with_strides(value, following.stride if following else value.stride())
        self._older, self._newer = self._newer, Value(value, None)
        self._position = index

    def _ends(self) -> tuple[Tensor, Tensor]:
        assert self._older is not None  # invariant: a placeholder exists, so a step ran
        assert self._newer is not None
        older_name = self.rule.names[max(self._position - 1, 0)]
        return self._older.checked(older_name), self._newer.checked(self.rule.names[self._position])


class Step:
    """Stands in for the forward of the `index`-th block of a stage.

    Args:
        block: the module, as it was; its own forward is T.
        rule: what the stage's steps share.
        index: k, counted from 0; the first step is the ordinary block.
        predictor: q.
        stream: which argument is the stream, a position or a keyword.
        transform: T where it is a part of the block: called as its forward, with the block before the arguments.
        result: which of several results is the stream, None where T returns one tensor; the others pass through.
    """

    def __init__(
        self,
        block: nn.Module,
        rule: StageRule,
        index: int,
        predictor: Predictor,
        stream: int | str = 0,
        transform: Callable[..., Any] | None = None,
        result: int | None = None,
    ) -> None:
        self.block, self.rule, self.index, self.predictor, self.stream = block, rule, index, predictor, stream
        self.transform = transform or type(block).forward
        self.result = result

    @property
    def name(self) -> str:
        return self.rule.names[self.index]

    @hidden_from_compiler
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: side inputs and results of every type pass through
        if self.rule.random_sign and not self.block.training:
            return self.transform(self.block, *args, **kwargs)
        x, side = split_stream(self.stream, self.name, args, kwargs)
        tape, z, older = self._take(x)
        if not tape.continues_at(self.index):
            tape = Tape(self.rule)
        branch_dtype = z.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        value, others = self._step(tape, z, older, side, branch_dtype)
        visible = value.to(branch_dtype)
        if self.index + 1 < len(self.rule.names):
            newest = None if visible is value else value
            visible.revify_link = Link(tape, self.index + 1, z, newest, version(visible))  # type: ignore[attr-defined]
        else:
            tape.check_range()
        if self.result is None:
            return visible
        return (*others[: self.result], visible, *others[self.result :])

    def _take(self, x: Tensor) -> tuple[Tape, Tensor, Tensor | None]:
        """The tape of this forward pass, z[k] and z[k-1]."""
        link = take_link(x, self.rule, self.index)
        if link is None:
            tape = Tape(self.rule)
            tape.enter(x)
            return tape, OnGrid.apply(x, self.rule.grid), None
        assert isinstance(link.tape, Tape)  # a rule belongs to steps only
        return link.tape, x if link.newest is None else Resume.apply(x, link.newest), link.older

    def _step(
        self, tape: Tape, z: Tensor, older: Tensor | None, side: tuple[Any, ...], branch_dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """z[k+1] from z[k] and z[k-1], recorded on the tape where a backward may come, and the block's other results."""
        args, kwargs = side
        sign = self._draw_sign(z) if older is not None and self.rule.random_sign else None
        recorded = saves_nothing()
        if recorded:
            rerun = Rerun(self.name, self._branch, self.block, SideInputs.of((None, None, branch_dtype, *args), kwargs))
            tape.append(self.index, z, Entry(self, rerun, z.requires_grad, z.stride(), checksum(z), sign))
            gap, t, late, others = rerun.first(
                lambda: self._branch(z, older, sign, branch_dtype, *args, **kwargs),
                z.device,
                partial(tape.load, self.index),
            )
        else:
            gap, t, late, others = self._branch(z, older, sign, branch_dtype, *args, **kwargs)
        value, residue = t, None
        if older is not None:
            value, residue = Join.apply(t, gap, late, self.rule.bits, self.rule.grid, sign)
            tape.observe(self.index, gap)
            if late is not None:
                tape.observe(self.index, gap.detach() - late.detach())
        tape.observe(self.index, value)
        if recorded:
            tape.advance(self.index, t, value, residue)
        return value, others

    def _draw_sign(self, z: Tensor) -> Tensor:
        """±1 for each sample, from the user's random numbers (BDIA, Zhang et al. 2025)."""
        coins = torch.randint(0, 2, (len(z), *(1,) * (z.dim() - 1)), device=z.device)
        return coins.to(z.dtype) * 2 - 1

    def _branch(
        self,
        z: Tensor,
        older: Tensor | None,
        sign: Tensor | None,
        branch_dtype: torch.dtype,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
        """u = z[k-1] − a(z[k]), or a(z[k]) alone where z[k-1] is what is sought; T(z[k]); c(T(z[k])); the rest."""
        first = self.index == 0
        forecast = z if first else self.predictor.before(z)
        if older is not None:
            forecast = Gap.apply(older, forecast, self.rule.bits, sign)
        if isinstance(self.stream, int):
            args = (*args[: self.stream], z.to(branch_dtype), *args[self.stream + 1 :])
        else:
            kwargs = {**kwargs, self.stream: z.to(branch_dtype)}
        before = version(z)
        outputs = self.transform(self.block, *args, **kwargs)
        others: tuple[Any, ...] = ()
        if self.result is not None and isinstance(outputs, tuple | list) and len(outputs) > self.result:
            others = (*outputs[: self.result], *outputs[self.result + 1 :])
            outputs = outputs[self.result]
        if not isinstance(outputs, Tensor) or outputs.shape != z.shape:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise StreamError(
                f"{self.name}: expected an output of the shape of its input, {tuple(z.shape)}, got {got}."
            )
        if version(z) != before:
            raise StreamError(
                f"{self.name} changes its input in place, so the stream cannot go through it. Make the first operation "
                "of the block an out-of-place one (for activations inplace=False) before converting."
            )
        t = OnGrid.apply(outputs, self.rule.grid)
        return forecast, t, None if first else self.predictor.after(t), others

    def parts_again(self, entry: Entry, z: Tensor, *, catch: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """a(z[k]), T(z[k]) and c(T(z[k])) once more, without a graph."""
        forecast, t, late, _ = entry.rerun.again(z.detach().requires_grad_(entry.needs_grad), catch=catch)
        return forecast.detach(), t.detach(), None if late is None else late.detach()


def with_strides(values: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values, laid out in memory with these strides."""
    if values.stride() == stride:
        return values
    return torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device).copy_(values)
