"""Coded updates: a step whose inverse runs nothing.

    z[k] ── T ──▶ u = T(z[k]) − z[k] + e[k]      c = code of u (`codes`), b bits an element
                  z[k+1] = z[k] + s·c             e[k+1] = u − s·c, carried along in forward only

Forward. A block is given z[k] in the type in which it came, runs with its saved tensors dropped (`reruns`), and the value
that goes on to the next block is z[k+1]. The tape of the pass keeps the value with which the stage began and the code of
each update, nothing else. The gradient goes straight through to T(z[k]), so autograd's graph is that of the plain model.
The last step of a stage needs no code: it returns T(z[k]) + e[k], and so gives back what the codes before left out.

Backward. z[k] is the first value and k codes, summed in the order of forward; from there one code is subtracted for each
step back. Where values left the range in which a subtraction is exact, or are not finite, it is summed from the start
instead: slower, never wrong. The block then runs again on z[k] for its saved tensors only.

A pass needs no order and no fixed length: a block that is skipped, called twice, or called on something else than the
value before it (then a new tape begins with that) costs memory, not exactness.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from revify.runtime.arguments import pick_stream, split_stream, with_stream
from revify.runtime.codes import Code, Running, decode
from revify.runtime.conditions import drop_weight_copies
from revify.runtime.guards import Repeats
from revify.runtime.links import Rider, carrier
from revify.runtime.randomness import Draws, own_numbers
from revify.runtime.replay import SideInputs, version
from revify.runtime.reruns import Rerun
from revify.runtime.standing_in import StageStep
from revify.runtime.tape import Value, saves_nothing
from revify.runtime.views import with_views, without_views


class CodeTape:
    """One forward pass through blocks of a stage: the value that it began with, and the code of each update.

    Args:
        name: of the block that it begins with.
        origin: what that block was given.
        running: the stream there, None where no code will follow.
        bits: b of the codes.
    """

    def __init__(self, name: str, origin: Tensor, running: Running | None, bits: int) -> None:
        self._name, self._bits = name, bits
        self._on_grid = running is not None and origin is running.z
        self._origin = Value(origin.detach(), version(origin))
        self._running = running.without_values() if running is not None else None
        self._codes: list[Code] = []
        self._subtracts: bool | None = None  # whether subtracting codes is exact here; None: not looked at yet
        self._place: tuple[int, Tensor] | None = None  # k and z[k], while a backward works in this stage
        self._loaded: Rerun | None = None
        self._repeats = Repeats()
        self.draws = Draws()

    @property
    def position(self) -> int:
        """k: how many codes there are."""
        return len(self._codes)

    def append(self, code: Code, running: Running) -> None:
        """A step was taken, with this code, to where the stream now is."""
        self._codes.append(code)
        self._running, self._subtracts = running.without_values(), None

    def load(self, position: int, entry: Entry) -> None:
        """Run the block that stands at z[position] again, for its saved tensors."""
        with torch.no_grad():
            if self._loaded is not None:
                self._loaded.forget()
            self._loaded = entry.rerun
            origin = self._origin.checked(self._name)
            z = origin if position == 0 and not self._on_grid else self._value(position, origin)
            if position == 0:
                self._place = None
        entry.rerun.again(z.detach().to(entry.dtype).requires_grad_(entry.needs_grad), catch=True, outputs=False)
        self._repeats.note(entry.rerun.name, None, *entry.rerun.differs)
        self._repeats.check_in_the_end()

    def _value(self, position: int, origin: Tensor) -> Tensor:
        """z[position]. Values that were handed out before stay as they are."""
        if self._place is None or (self._place[0] > position and not self._may_subtract()):
            begin = origin if self._on_grid else Running.of(origin).z
            self._place = self._summed(0, begin, position)
        elif self._place[0] < position:
            self._place = self._summed(*self._place, position)
        number, z = self._place
        while number > position:
            number -= 1
            change = self._change(number)
            z = torch.sub(z, change, out=change)
        self._place = number, z
        return z

    def _summed(self, number: int, z: Tensor, position: int) -> tuple[int, Tensor]:
        """From z[number] to z[position], by the additions of the forward pass."""
        for later in range(number, position):
            z = self._change(later).add_(z)
        return position, z

    def _change(self, number: int) -> Tensor:
        assert self._running is not None  # where there are codes, there is a frame
        return decode(self._codes[number], self._running.g, self._bits, self._running.frame)

    def _may_subtract(self) -> bool:
        if self._subtracts is None:
            assert self._running is not None  # where there are codes, there is a frame
            self._subtracts = bool(self._running.subtracts)
        return self._subtracts


@dataclass(frozen=True, slots=True)
class Entry:
    """A block that ran, as the tape must know it to run it again.

    Args:
        rerun: its second run.
        dtype: of what it was given.
        needs_grad: whether that had a gradient.
    """

    rerun: Rerun
    dtype: torch.dtype
    needs_grad: bool


class Link(Rider):
    """Rides on a coded value on its way to the next block.

    Args:
        rule: of the stage.
        running: the stream there.
        tape: of this pass, None where nothing is recorded so far.
        version: of the value that it rides on.
    """

    __slots__ = ("rule", "running", "tape", "version")

    def __init__(self, rule: CodedRule, running: Running, tape: CodeTape | None, version: int) -> None:
        self.rule, self.running, self.tape, self.version = rule, running, tape, version


class Straight(Function):
    """A value in place of t, with the gradient straight through to t."""

    @staticmethod
    def forward(t: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # Any: autograd's context has no public type
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return grad, None


@dataclass(frozen=True, slots=True)
class CodedRule:
    """What the steps of one stage share.

    Args:
        names: of the steps, in order.
        bits: b of each code, 2…8.
        compares: whether second runs must repeat the first to the bit.
    """

    names: tuple[str, ...]
    bits: int
    compares: bool = True


class CodedStep(StageStep[CodedRule]):
    """Stands in for a block whose stage has coded steps.

    A block in eval mode is the plain block: it leaves no code, and where a gradient flows it runs again from its input.
    """

    def run(self, *args: Any, **kwargs: Any) -> Any:  # Any: side inputs and results of every type pass through
        x, side = split_stream(self.stream, self.name, args, kwargs)
        coded = self.module.training
        link = self._link(x)
        running = link.running if link is not None else Running.of(x) if coded and not self.last else None
        tape = link.tape if link is not None else None
        with own_numbers(draws=coded):
            if saves_nothing():
                origin = x if link is None else link.running.z
                t, others, tape = self._recorded(x, side, tape, origin, running)
            else:
                (t, others), tape = self._branch(x, *side[0], **side[1]), None
        drop_weight_copies(x.device)
        value = t if running is None or not coded else self._stepped(t, running, tape)
        return value if self.result is None else (*others[: self.result], value, *others[self.result :])

    def _link(self, x: Tensor) -> Link | None:
        """What rides on x, taken off it; None where a new pass begins with x."""
        riders = carrier(x, "revify_code").__dict__
        link: Link | None = riders.get("revify_code") or None
        if link is None or link.rule is not self.rule:
            return None  # of another stage: the value goes to its own next block as well
        del riders["revify_code"]
        return link if link.version == version(x) else None

    @property
    def plain_in_eval(self) -> bool:
        """Whether a block in eval mode is run as it was: yes."""
        return True

    def _recorded(
        self, x: Tensor, side: tuple[Any, Any], tape: CodeTape | None, origin: Tensor, running: Running | None
    ) -> tuple[Tensor, tuple[Any, ...], CodeTape | None]:
        """T(x) and the other results, with nothing saved; the tape, None where there was nothing to save."""
        known = tape
        if tape is None:
            tape = CodeTape(self.name, origin, running, self.rule.bits)
        kept = SideInputs.of(*without_views(side, x, x))
        compares = self.rule.compares
        rerun = Rerun(self.name, self._branch, self.module, kept, self.habits, tape.draws, exact=compares, seen=False)
        load = partial(tape.load, tape.position, Entry(rerun, x.dtype, x.requires_grad))
        t, others = rerun.first(lambda: self._branch(x, *side[0], **side[1]), x.device, load)
        return t, others, tape if known is not None or rerun.drops else None

    def _stepped(self, t: Tensor, running: Running, tape: CodeTape | None) -> Tensor:
        """The value that goes on."""
        if self.last:
            with torch.no_grad():
                value = running.error.add_(t).to(t.dtype)
            return Straight.apply(t, value)
        following, code = running.stepped(t.detach(), self.rule.bits)
        value = Straight.apply(t, following.z.to(t.dtype))
        if tape is not None:
            tape.append(code, following)
        value.revify_code = Link(self.rule, following, tape, version(value))
        return value

    def _branch(self, x: Tensor, /, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """T(x), and the other results."""
        args, kwargs = with_stream(self.stream, x, *with_views((args, kwargs), x))
        before = version(x)
        outputs = self.transformed(*args, **kwargs)
        return pick_stream(self.name, outputs, self.result, x, before)
