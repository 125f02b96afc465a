"""Coded steps with something between them: each codes what it is given, as the way there from what the one before was given.

    x[k] ──▶ z[k] = z[k-1] + s·c        c: the code of x[k] − z[k-1], b bits an element; the first step is given x[0] itself
             T(z[k]) ──▶ whatever the model does with it (a sum in a loop, a gate, a position) ──▶ x[k+1]

A chain of coded steps (`coded`) codes what a block returns, which the next one must be given. Here nothing is asked of
what lies between two steps, nor of what T returns, and one module may be several steps: z[k] is a checkpoint of
b bits, told from the checkpoint before it. The gradient goes straight through from z[k] to x[k]. Where T adds to its
input, what the code left out is added to what it returns, so that nothing is lost on the way.

A value that something was done to carries no link. So the steps find their pass by where they are called: in a call
of the module that all of them lie in (`Opening`). Called elsewhere, a step begins with its own input, as it does in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revify.runtime.arguments import split_stream, with_stream
from revify.runtime.coded import CodedRule, CodedStep, CodeTape, Straight
from revify.runtime.codes import Running
from revify.runtime.conditions import drop_weight_copies
from revify.runtime.grid import stream_dtype
from revify.runtime.randomness import own_numbers
from revify.runtime.standing_in import StandIn
from revify.runtime.tape import saves_nothing
from revify.runtime.views import with_views


@dataclass(slots=True)
class Pass:
    """One forward pass through the steps of a stage.

    Attributes:
        running: the value that the last step ran on, None before the first.
        tape: what is kept of it, None where nothing was recorded so far.
    """

    running: Running | None = None
    tape: CodeTape | None = None

    def at(self, x: Tensor, bits: int) -> Tensor:
        """What a step that is given x runs on; it begins anew where x is of another kind than what came before."""
        running = self.running
        if running is None or not _alike(x, running):
            self.running, self.tape = Running.of(x), None
            return x
        left = replace(running, error=torch.zeros_like(running.z))
        self.running, code = left.stepped(x.detach(), bits)
        if self.tape is not None:
            self.tape.append(code, self.running)
        return Straight.apply(x, self.running.z.to(x.dtype))


Passes = dict[CodedRule, Pass]
_open: ContextVar[Passes | None] = ContextVar("revify_open_passes", default=None)


class Opening(StandIn):
    """Stands in for the forward of the module in whose calls the steps of some stages form a pass.

    Attributes:
        rules: of those stages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.rules: tuple[CodedRule, ...] = ()

    @property
    def plain_in_eval(self) -> bool:
        """Whether a module in eval mode is run as it was: yes, then no step of it is coded."""
        return True

    def run(self, *args: Any, **kwargs: Any) -> Any:  # Any: the module's own signature
        with _opened(self.rules):
            return self.within(*args, **kwargs)

    def within(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self.plain(*args, **kwargs)


class ApartStep(CodedStep):
    """Stands in for the forward of a module of a stage whose steps have something between them.

    Attributes:
        adds: whether T adds to its input.
    """

    adds = False

    def run(self, *args: Any, **kwargs: Any) -> Any:  # Any: side inputs and results of every type pass through
        x, side = split_stream(self.stream, self.name, args, kwargs)
        coded = self.module.training
        now = (_open.get() or {}).get(self.rule) if coded else None
        given = x if now is None else now.at(x, self.rule.bits)
        side = side if given is x else pytree.tree_map(lambda value: given if value is x else value, side)
        with own_numbers(draws=coded):
            if saves_nothing():
                begins = now is None or now.running is None or given is x
                running = None if now is None else now.running
                tape = None if now is None else now.tape
                origin = x if begins or running is None else running.z
                outputs, _, tape = self._recorded(given, side, tape, origin, running)
                if now is not None:
                    now.tape = tape
            else:
                outputs, _ = self._branch(given, *side[0], **side[1])
        drop_weight_copies(x.device)
        return outputs if given is x or not self.adds else self._made_good(outputs, x, given)

    def _made_good(self, outputs: Any, x: Tensor, given: Tensor) -> Any:
        """The results, with what the code left out of the input added to the sum."""
        t = outputs if self.result is None else outputs[self.result]
        with torch.no_grad():
            value = (x - given).add_(t).to(t.dtype)
        t = Straight.apply(t, value)
        return t if self.result is None else type(outputs)((*outputs[: self.result], t, *outputs[self.result + 1 :]))

    def _branch(self, x: Tensor, /, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        """T(x), whatever it is."""
        args, kwargs = with_stream(self.stream, x, *with_views((args, kwargs), x))
        return self.transformed(*args, **kwargs), ()


@contextmanager
def _opened(rules: tuple[CodedRule, ...]) -> Iterator[None]:
    token = _open.set({**(_open.get() or {}), **{rule: Pass() for rule in rules}})
    try:
        yield
    finally:
        _open.reset(token)


def _alike(x: Tensor, running: Running) -> bool:
    same = x.shape == running.frame.shape and x.device == running.z.device
    return same and stream_dtype(x.dtype) == running.z.dtype
