"""A sequence of couplings forward without keeping anything, and wound back by instructions in backward.

Forward. Each coupling runs as its program. A branch is called under hooks that drop what autograd saves (`reruns`);
what the operations around it save is replaced by its name in the program. The tape keeps the last streams and, where
a product contracts, the packed residues.

Backward. When autograd first needs something that was dropped in layer k, the tape stands at the outputs of layer k, or
is wound there, and takes instructions of the derived inverse. A branch is called there anyway: this call is also the
second run that gives its saved tensors, so each branch runs twice in all, and one branch's activations live at a time.

On a grid the reconstructed values are the same bits, which a checksum confirms. Without one they drift, and how far is
measured on samples of the streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revify.couplings.deriving import Coupling
from revify.couplings.programs import Apply, Call, Instruction, names
from revify.errors import StreamError
from revify.runtime.factors import Factors
from revify.runtime.fingerprints import checksum
from revify.runtime.guards import Drifts, Peaks, Repeats
from revify.runtime.layers import Layer, Values, operands
from revify.runtime.numbers import Numbers
from revify.runtime.passages import Named, Passage, place, sample
from revify.runtime.randomness import Draws, own_numbers
from revify.runtime.replay import SideInputs, version
from revify.runtime.reruns import Rerun
from revify.runtime.states import Habits
from revify.runtime.tape import Value, with_strides


class Rewind:
    """One forward pass through a sequence: able to stand at the outputs of every layer, holding those of one.

    Args:
        numbers: how its values are held.
        recorded: whether a backward may come, with nothing saved for it.
        divides: whether it divides by factors that the couplings guard, rather than its backward only.
    """

    def __init__(self, numbers: Numbers, *, recorded: bool, divides: bool = False) -> None:
        self.numbers = numbers
        self.recorded = recorded
        self._divides = divides
        self._passages: list[Passage] = []
        self._ends: list[Value] = []  # the last streams, until the first step back
        self._position = -1
        self._values: Values = {}  # of the layer at which the tape stands
        self._ahead: list[Instruction] = []  # of its inverse
        self._peaks = Peaks(numbers.grid) if recorded and numbers.grid is not None else None
        self._finite = True  # whether the ends are; known once a backward begins
        self._factors = Factors() if recorded or divides else None
        self._repeats: Repeats | Drifts = Drifts() if numbers.grid is None else Repeats()
        self._draws = Draws()

    # Forward

    def enter(self, name: str, *streams: Tensor) -> None:
        """Note what the pass begins with."""
        if self._peaks is not None:
            for stream in streams:
                self._peaks.enter(name, stream)

    def forward(
        self, layer: Layer, streams: tuple[Tensor, ...], residues: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Run one layer.

        Args:
            layer: the coupling; a reversed one leads from its outputs to its inputs.
            streams: what goes into it.
            residues: the bits that a reversed layer's values lost when they contracted.
        """
        passage, program = Passage(layer, residues=dict(residues or {})), layer.coupling.forward
        self._passages.append(passage)
        values = dict(zip(program.inputs, streams, strict=True))
        if self.recorded:
            passage.marks = {name: self._mark(value) for name, value in values.items()}
        shapes = {stream.shape for stream in streams}
        for step in program.instructions:
            if isinstance(step, Call):
                values |= zip(step.results, self._call(len(self._passages) - 1, step, values), strict=True)
            elif self._shifts(passage, step):
                values[step.result] = self._compute(passage, step, values)
            else:
                values[step.result] = self._apply(len(self._passages) - 1, step, values, shapes)
                if self._peaks is not None:
                    self._peaks.observe(layer.name, values[step.result])
                if self._factors is not None and step.result in program.guarded:
                    self._factors.note(layer.name, values[step.result])
        if self.recorded:
            passage.needs_grad = {name: value.requires_grad for name, value in values.items()}
            passage.strides = {name: value.stride() for name, value in values.items()}
        outputs = tuple(values[name] for name in program.outputs)
        if sorted(map(tuple, shapes)) != sorted({tuple(y.shape) for y in outputs}):
            raise StreamError(
                f"{layer.name}: streams of shapes {', '.join(str(tuple(x.shape)) for x in streams)} came out as "
                f"{', '.join(str(tuple(y.shape)) for y in outputs)}. Each branch must give the shape of the stream "
                "that it is added to."
            )
        return outputs

    def finish(self, outputs: tuple[Tensor, ...]) -> None:
        """The pass ends with these streams, or exact copies of them."""
        self.stop(outputs)
        if self._divides and self._factors is not None:
            self._factors.check()
        if self._peaks is not None:
            self._peaks.check()

    def stop(self, outputs: tuple[Tensor, ...]) -> None:
        """The pass stands at these streams; more layers may follow, or a backward."""
        if self.recorded:
            self._ends = [Value(y.detach(), version(y)) for y in outputs]
            self._position = len(self._passages) - 1

    def residues(self) -> list[dict[str, Tensor]]:
        """The packed bits of every layer."""
        return [passage.residues for passage in self._passages]

    def _call(self, k: int, step: Call, values: Values) -> tuple[Tensor, ...]:
        passage = self._passages[k]
        layer, given = passage.layer, [values[name] for name in operands(step)]
        side = dict(layer.sides.get(step.branch, {}))
        branch = layer.branches[step.branch]
        if not self.recorded:
            with own_numbers(draws=branch.training):
                return layer.call(step, self.numbers, *given, **side)
        run = partial(layer.call, step, self.numbers)
        name, again = f"{layer.name}, branch {step.branch}", SideInputs.of((), side)
        habits = layer.habits.setdefault(step.branch, Habits())
        rerun = Rerun(name, run, branch, again, habits, self._draws, exact=self.numbers.grid is not None)
        passage.reruns[step.results] = rerun
        device = given[0].device if given else values[layer.coupling.forward.inputs[0]].device
        load = partial(self._load_call, k, step)
        with own_numbers(draws=branch.training):
            results: tuple[Tensor, ...] = rerun.first(lambda: run(*given, **side), device, load)
        return results

    def _shifts(self, passage: Passage, step: Apply) -> bool:
        """Whether the operation shifts bits out, or those that were kept in again."""
        return (step.undoes or step.result) in self.numbers.bits(passage.layer.coupling)

    def _compute(self, passage: Passage, step: Apply, values: Values) -> Tensor:
        """The result of an operation; bits that it shifts out are kept in the passage, and come from there again."""
        if not self._shifts(passage, step):
            return self.numbers.apply(step, values)
        if step.undoes is None:
            value, passage.residues[step.result] = self.numbers.contract(step, values)
            return value
        bits = self.numbers.bits(passage.layer.coupling)[step.undoes]
        return self.numbers.expand(step, values, passage.residues[step.undoes], bits)

    def _apply(self, k: int, step: Apply, values: Values, shapes: set[torch.Size]) -> Tensor:
        layer = self._passages[k].layer
        if not self.recorded:
            return layer.apply(step, self.numbers, values, shapes)
        own = {name: place(values[name]) for name in names(step.operands)}

        def drop(tensor: Tensor) -> Named:
            named = [name for name, where in own.items() if where == place(tensor)]
            return Named(partial(self._load_value, k, named[0] if named else step.result))

        with saved_tensors_hooks(drop, lambda kept: kept.load()):
            return layer.apply(step, self.numbers, values, shapes)

    # Backward

    def _load_call(self, k: int, step: Call) -> None:
        """Have what a branch call saved."""
        with torch.no_grad():
            self._stand_at(k)
            caught = False
            while not self._knows(step.results) and not caught:
                caught = self._undo(catch=True) == step.results
            if not caught:
                self._again(step, catch=True)
        self._repeats.check_in_the_end()

    def _load_value(self, k: int, name: str) -> Tensor:
        """Have a value of a layer's program."""
        with torch.no_grad():
            self._stand_at(k)
            while not self._knows((name,)):
                self._undo(catch=True)
        self._repeats.check_in_the_end()
        return self._values[name]

    def _stand_at(self, k: int) -> None:
        """Wind to layer k, with its outputs known."""
        if self._ends:
            if self._peaks is not None:
                self._peaks.check()
            ends = [value.checked("the sequence") for value in self._ends]
            self._finite = all(bool(end.isfinite().all()) for end in ends)
            if self._finite and self._factors is not None:
                self._factors.check()
            self._ends = []
            self._enter(self._position, ends)
        while self._position > k:
            while self._ahead:
                self._undo(catch=False)
            inputs = [self._values[name] for name in self._coupling.forward.inputs]
            self._leave()
            self._enter(self._position - 1, inputs)
        while self._position < k:
            outputs = [self._values[name] for name in self._coupling.forward.outputs]
            self._leave()
            self._redo(self._position + 1, outputs)

    @property
    def _coupling(self) -> Coupling:
        return self._passages[self._position].layer.coupling

    def _enter(self, k: int, outputs: list[Tensor]) -> None:
        """Stand at layer k, coming from behind it: what is known is its outputs."""
        self._position, coupling = k, self._passages[k].layer.coupling
        self._values = {}
        for name, value in zip(coupling.forward.outputs, outputs, strict=True):
            self._learn(name, value)
        self._ahead = list(coupling.inverse.instructions)

    def _leave(self) -> None:
        for rerun in self._passages[self._position].reruns.values():
            rerun.forget()

    def _redo(self, k: int, inputs: list[Tensor]) -> None:
        """Stand at layer k, coming from before it, with everything known: only a second backward needs this."""
        self._position, self._values, self._ahead = k, {}, []
        for name, value in zip(self._coupling.forward.inputs, inputs, strict=True):
            self._learn(name, value)
        self._fill()

    def _fill(self) -> None:
        """Know every value of the layer, once its inputs are."""
        passage = self._passages[self._position]
        for step in self._coupling.forward.instructions:
            if self._knows(step.results):
                continue
            if isinstance(step, Call):
                self._again(step, catch=False)
            else:
                self._learn(step.result, self._compute(passage, step, self._values))

    def _undo(self, *, catch: bool) -> tuple[str, ...]:
        """Take the next instruction of the inverse, with all operations that follow a call; the call's results."""
        passage = self._passages[self._position]
        called: tuple[str, ...] = ()
        if not self._ahead:
            self._fill()  # what the inverse did not need
        elif isinstance(step := self._ahead[0], Call):
            self._again(step, catch=catch)
            self._ahead.pop(0)  # only now: after an error in the branch, a second try begins with it again
            called = step.results
        while self._ahead and isinstance(step := self._ahead[0], Apply):
            self._learn(step.result, self._compute(passage, step, self._values))
            self._ahead.pop(0)
            self._check(step.result)
        return called

    def _again(self, step: Call, *, catch: bool) -> None:
        """Run a branch again on values that are known."""
        passage = self._passages[self._position]
        given = [self._values[n].detach().requires_grad_(passage.needs_grad[n]) for n in operands(step)]
        rerun = passage.reruns[step.results]
        results = rerun.again(*given, catch=catch)
        if catch and isinstance(self._repeats, Repeats) and self._finite:
            self._repeats.note(rerun.name, None, *rerun.differs)
        for name, result in zip(step.results, results, strict=True):
            self._learn(name, result.detach())

    def _learn(self, name: str, value: Tensor) -> None:
        self._values[name] = with_strides(value, self._passages[self._position].strides.get(name, value.stride()))

    def _knows(self, wanted: tuple[str, ...]) -> bool:
        return self._values.keys() >= set(wanted)

    def _mark(self, stream: Tensor) -> Tensor:
        return sample(stream) if self.numbers.grid is None else checksum(stream)

    def _check(self, name: str) -> None:
        """Compare an input stream of the layer, once it is known, with what came in, where all values are finite."""
        passage = self._passages[self._position]
        if name not in passage.marks or not self._finite:
            return
        mark = self._mark(self._values[name])
        if isinstance(self._repeats, Drifts):
            self._repeats.note(passage.layer.name, mark, passage.marks[name])
        else:
            self._repeats.note(passage.layer.name, mark != passage.marks[name])
