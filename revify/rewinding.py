"""A sequence of couplings forward without keeping anything, and wound back, instruction by instruction, in backward.

Forward. Each coupling runs as its program. A branch is called under hooks that drop what autograd saves (`reruns`); what
the operations around it save is replaced by its name in the program. The tape keeps the last streams and, where a
product contracts, the packed residues.

Backward. When autograd first needs something that was dropped in layer k, the tape stands at the outputs of layer k, or
is wound there, and takes instructions of the derived inverse. A branch is called there anyway: this call is also the
second run that gives its saved tensors, so each branch runs twice in all, and one branch's activations live at a time.

On a grid the reconstructed values are the same bits, which a checksum confirms. Without one they drift, and how far is
measured on samples of the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revify.algebra.programs import Apply, Call, Instruction, Program, names
from revify.arithmetic import Numbers
from revify.couplings import Coupling
from revify.errors import StreamError
from revify.guards import Drifts, Peaks, Repeats, checksum
from revify.replay import SideInputs, version
from revify.reruns import Rerun
from revify.runtime import Value, with_strides

Values = dict[str, Tensor]
Sides = Mapping[str, Mapping[str, Any]]  # Any: side inputs of every type pass through
SAMPLES = 256  # of each stream, to measure the drift


@dataclass(frozen=True, slots=True)
class Layer:
    """One coupling of the sequence.

    Args:
        name: for errors.
        coupling: with its inverse.
        branches: by their letters in the formula.
        sides: keyword arguments of each branch.
    """

    name: str
    coupling: Coupling
    branches: Mapping[str, nn.Module]
    sides: Sides

    def call(self, step: Call, numbers: Numbers, *values: Tensor, **side: Any) -> tuple[Tensor, ...]:
        """What a branch gives for stream values, as stream values."""
        called = f"{self.name}, branch {step.branch}"
        versions = [version(value) for value in values]
        branch = partial(self._given, self.branches[step.branch], numbers, side)
        given = step.execute(dict(zip(_operands(step), values, strict=True)), {step.branch: branch})
        if [version(value) for value in values] != versions:
            raise StreamError(
                f"{called} changes its input in place, so the stream cannot go through it. Make its first operation an "
                "out-of-place one (for activations inplace=False)."
            )
        for result in given:
            if not isinstance(result, Tensor):
                raise StreamError(f"{called} gave a {type(result).__name__}: expected a tensor, which is added to a stream.")
        return tuple(map(numbers.held, given))

    def apply(self, step: Apply, numbers: Numbers, values: Values, shapes: set[torch.Size]) -> Tensor:
        """What an operation between the branches gives."""
        try:
            return numbers.apply(step, values)
        except RuntimeError as error:
            found = ", ".join(f"{name} {tuple(values[name].shape)}" for name in names(step.operands))
            raise StreamError(
                f"{self.name}: the shapes of {found} do not fit each other; the streams came in as "
                f"{', '.join(str(tuple(s)) for s in shapes)}. Each branch must give the shape of the stream that it is "
                f"added to ({error})."
            ) from error

    @staticmethod
    def _given(branch: nn.Module, numbers: Numbers, side: dict[str, Any], *values: Tensor) -> Any:
        return branch(*(value.to(numbers.branch_dtype) for value in values), **side)


@dataclass(slots=True)
class Passage:
    """What the tape keeps of one layer.

    Args:
        layer: the layer.
        reruns: of its branch calls, by the names of their results.
        needs_grad: which values had a gradient.
        strides: of every value, which its reconstruction must have too: kernels depend on them.
        marks: of the input streams, a checksum or a sample.
        residues: the packed bits of values that contracted.
    """

    layer: Layer
    reruns: dict[tuple[str, ...], Rerun] = field(default_factory=dict)
    needs_grad: dict[str, bool] = field(default_factory=dict)
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    marks: dict[str, Tensor] = field(default_factory=dict)
    residues: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Named:
    """Stands in a graph for a value of a layer's program."""

    load: Callable[[], Tensor]


class Rewind:
    """One forward pass through a sequence: able to stand at the outputs of every layer, holding those of one.

    Args:
        numbers: how its values are held.
        recorded: whether a backward may come, with nothing saved for it.
    """

    def __init__(self, numbers: Numbers, *, recorded: bool) -> None:
        self.numbers = numbers
        self.recorded = recorded
        self._passages: list[Passage] = []
        self._ends: list[Value] = []  # the last streams, until the first step back
        self._position = -1
        self._values: Values = {}  # of the layer at which the tape stands
        self._ahead: list[Instruction] = []  # of its inverse
        self._peaks = None if numbers.grid is None else Peaks(numbers.grid)
        self._repeats: Repeats | Drifts = Drifts() if numbers.grid is None else Repeats()

    # Forward

    def forward(self, layer: Layer, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run one layer."""
        passage, program = Passage(layer), layer.coupling.forward
        self._passages.append(passage)
        values = dict(zip(program.inputs, streams, strict=True))
        if self.recorded:
            passage.marks = {name: self._mark(value) for name, value in values.items()}
        shapes = {stream.shape for stream in streams}
        for step in program.instructions:
            if isinstance(step, Call):
                values |= zip(step.results, self._call(len(self._passages) - 1, step, values), strict=True)
            elif step.result in self.numbers.bits(layer.coupling):
                values[step.result], passage.residues[step.result] = self.numbers.contract(step, values)
            else:
                values[step.result] = self._apply(len(self._passages) - 1, step, values, shapes)
                if self._peaks is not None:
                    self._peaks.observe(layer.name, values[step.result])
        if self.recorded:
            passage.needs_grad = {name: value.requires_grad for name, value in values.items()}
            passage.strides = {name: value.stride() for name, value in values.items()}
        outputs = tuple(values[name] for name in program.outputs)
        if sorted(map(tuple, shapes)) != sorted({tuple(y.shape) for y in outputs}):
            raise StreamError(
                f"{layer.name}: streams of shapes {', '.join(str(tuple(x.shape)) for x in streams)} came out as "
                f"{', '.join(str(tuple(y.shape)) for y in outputs)}. Each branch must give the shape of the stream that "
                "it is added to."
            )
        return outputs

    def finish(self, outputs: tuple[Tensor, ...]) -> None:
        """The pass ends with these streams, or exact copies of them."""
        if self._peaks is not None:
            self._peaks.check()
        if self.recorded:
            self._ends = [Value(y.detach(), version(y)) for y in outputs]
            self._position = len(self._passages) - 1

    def residues(self) -> list[dict[str, Tensor]]:
        """The packed bits of every layer."""
        return [passage.residues for passage in self._passages]

    def _call(self, k: int, step: Call, values: Values) -> tuple[Tensor, ...]:
        passage = self._passages[k]
        layer, given = passage.layer, [values[name] for name in _operands(step)]
        side = dict(layer.sides.get(step.branch, {}))
        if not self.recorded:
            return layer.call(step, self.numbers, *given, **side)
        run = partial(layer.call, step, self.numbers)
        branch = layer.branches[step.branch]
        rerun = Rerun(f"{layer.name}, branch {step.branch}", run, branch, SideInputs.of((), side))
        passage.reruns[step.results] = rerun
        device = given[0].device if given else values[layer.coupling.forward.inputs[0]].device
        results: tuple[Tensor, ...] = rerun.first(
            lambda: run(*given, **side), device, partial(self._load_call, k, step)
        )
        return results

    def _apply(self, k: int, step: Apply, values: Values, shapes: set[torch.Size]) -> Tensor:
        layer = self._passages[k].layer
        if not self.recorded:
            return layer.apply(step, self.numbers, values, shapes)
        own = {name: _place(values[name]) for name in names(step.operands)}

        def drop(tensor: Tensor) -> Named:
            named = [name for name, place in own.items() if place == _place(tensor)]
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
                caught = step.results in self._undo(catch=True)
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
            ends = [value.checked("the sequence") for value in self._ends]
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
        self._position, passage = k, self._passages[k]
        coupling = passage.layer.coupling
        self._values, self._ahead = {}, []
        for name, value in zip(coupling.forward.inputs, inputs, strict=True):
            self._learn(name, value)
        for step in coupling.forward.instructions:
            if isinstance(step, Call):
                self._again(step, catch=False)
            elif step.result in self.numbers.bits(coupling):
                value, passage.residues[step.result] = self.numbers.contract(step, self._values)
                self._learn(step.result, value)
            else:
                self._learn(step.result, self.numbers.apply(step, self._values))

    def _undo(self, *, catch: bool) -> tuple[str, ...]:
        """Take the next instruction of the inverse, with all operations that follow a call; the call's results."""
        passage, called = self._passages[self._position], ()
        if isinstance(self._ahead[0], Call):
            step = self._ahead.pop(0)
            assert isinstance(step, Call)  # as asked above; mypy does not see it through the list
            self._again(step, catch=catch)
            called = step.results
        while self._ahead and isinstance(step := self._ahead[0], Apply):
            self._ahead.pop(0)
            bits = self.numbers.bits(self._coupling)
            if step.undoes in bits:
                value = self.numbers.expand(step, self._values, passage.residues[step.undoes], bits[step.undoes])
            else:
                value = self.numbers.apply(step, self._values)
            self._learn(step.result, value)
            if step.result in passage.marks:
                self._repeats.note(passage.layer.name, *self._compare(value, passage.marks[step.result]))
        return called

    def _again(self, step: Call, *, catch: bool) -> None:
        """Run a branch again on values that are known."""
        passage = self._passages[self._position]
        given = [self._values[n].detach().requires_grad_(passage.needs_grad[n]) for n in _operands(step)]
        results = passage.reruns[step.results].again(*given, catch=catch)
        for name, result in zip(step.results, results, strict=True):
            self._learn(name, result.detach())

    def _learn(self, name: str, value: Tensor) -> None:
        self._values[name] = with_strides(value, self._passages[self._position].strides.get(name, value.stride()))

    def _knows(self, wanted: tuple[str, ...]) -> bool:
        return self._values.keys() >= set(wanted)

    def _mark(self, stream: Tensor) -> Tensor:
        return sample(stream) if self.numbers.grid is None else checksum(stream)

    def _compare(self, value: Tensor, mark: Tensor) -> tuple[Tensor, ...]:
        """What is noted of a reconstructed stream: whether it differs, or how far it drifted and how large it is."""
        if self.numbers.grid is not None:
            return (checksum(value) != mark,)
        return (sample(value) - mark).abs().max(), mark.abs().max()


def backwards(layer: Layer, numbers: Numbers, outputs: tuple[Tensor, ...], residues: Values) -> tuple[Tensor, ...]:
    """The input streams of a layer from its outputs, under ordinary autograd."""
    program, bits = layer.coupling.inverse, numbers.bits(layer.coupling)
    values = dict(zip(program.inputs, outputs, strict=True))
    for step in program.instructions:
        if isinstance(step, Call):
            given = [values[name] for name in _operands(step)]
            results = layer.call(step, numbers, *given, **dict(layer.sides.get(step.branch, {})))
            values |= zip(step.results, results, strict=True)
        elif step.undoes in bits:
            values[step.result] = numbers.expand(step, values, residues[step.undoes], bits[step.undoes])
        else:
            values[step.result] = layer.apply(step, numbers, values, {y.shape for y in outputs})
    return tuple(values[name] for name in program.outputs)


def sample(stream: Tensor) -> Tensor:
    """Up to SAMPLES values, evenly spread."""
    flat = stream.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].clone()


def _operands(step: Call) -> tuple[str, ...]:
    """The values that a call is given, each once."""
    return tuple(dict.fromkeys(names(step.operands)))


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
