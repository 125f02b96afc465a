"""Programs: a formula as a list of elementary instructions, to be run, solved and printed.

    y1 = x1 + F(x2)      →      Call   v1 = F(x2)
                                Apply  y1 = x1 + v1

Every value has a name and is computed once. A formula and its inverse share the names: what is `v1` on the
way forward is `v1` on the way back, so what was kept for a value on the one way is found on the other.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from revify.errors import RevifyError


class Op(Enum):
    """An elementary operation: the template of its text, how tightly that binds, and what it computes.

    It computes with tensors, numbers, or anything else that has these operators.
    """

    SAME = "{}", 3, lambda value: value
    ADD = "{} + {}", 1, operator.add
    SUBTRACT = "{} − {}", 1, operator.sub
    NEGATE = "−{}", 1, operator.neg
    MULTIPLY = "{}·{}", 2, operator.mul
    DIVIDE = "{} / {}", 2, operator.truediv
    EXP = "exp({})", 3, operator.methodcaller("exp")
    TANH = "tanh({})", 3, operator.methodcaller("tanh")
    SIGMOID = "sigmoid({})", 3, operator.methodcaller("sigmoid")

    template: str
    tightness: int
    compute: Callable[..., Any]  # Any: see above

    def __new__(cls, template: str, tightness: int, compute: Callable[..., Any]) -> Op:
        op = object.__new__(cls)
        op._value_ = op.template = template  # by which it is pickled
        op.tightness, op.compute = tightness, compute
        return op

    @property
    def arity(self) -> int:
        """How many operands it takes."""
        return self.template.count("{}")


@dataclass(frozen=True, slots=True)
class Constant:
    """A number, under the letter it has in the formula."""

    text: str
    value: float


def number(value: float) -> Constant:
    """A number that is its own letter."""
    text = f"{value:g}"
    return Constant(f"(−{text[1:]})" if value < 0 else text, float(value))


def fold(op: Op, *constants: Constant) -> Constant:
    """An operation on constants is a constant, whose letter is its formula."""
    value = op.compute(*(torch.tensor(constant.value, dtype=torch.float64) for constant in constants))
    return Constant(f"({op.template.format(*(constant.text for constant in constants))})", float(value))


Operand = str | Constant  # the name of a value, or a number
Values = Mapping[str, Any]  # Any: tensors as a rule, intervals when a program is analysed
Branches = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """`results = branch(operands)`; a branch that gives one value has one result."""

    results: tuple[str, ...]
    branch: str
    operands: tuple[Operand, ...]

    def execute(self, values: Values, branches: Branches) -> tuple[Any, ...]:
        """The results, from the values so far."""
        given = branches[self.branch](*_look_up(self.operands, values))
        count, several = len(self.results), isinstance(given, tuple | list)
        if several != (count > 1) or (several and len(given) != count):
            found = f"a tuple of {len(given)}" if several else f"a {type(given).__name__}"
            raise RevifyError(
                f"Branch {self.branch} gave {found} where the coupling takes {', '.join(self.results)}: pass "
                f"one that returns {'one tensor' if count == 1 else f'a tuple of {count} tensors'}."
            )
        return tuple(given) if several else (given,)


@dataclass(frozen=True, slots=True)
class Apply:
    """`result = op(operands)`.

    Attributes:
        undoes: in an inverse, the value whose definition this solves for `result`; else None.
    """

    result: str
    op: Op
    operands: tuple[Operand, ...]
    undoes: str | None = None

    @property
    def results(self) -> tuple[str, ...]:
        """The one result, as for a `Call`."""
        return (self.result,)

    def execute(self, values: Values, branches: Branches) -> tuple[Any, ...]:
        """The result, from the values so far."""
        return (self.op.compute(*_look_up(self.operands, values)),)


Instruction = Call | Apply


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions that lead from the inputs to the outputs.

    `program(*inputs, *branches)` gives the outputs. A runtime that does more at an instruction (record
    gradients around a branch, keep the residue of a product) goes through `instructions` itself.

    Attributes:
        inputs: names of the streams that go in.
        branches: names of the branches, in the order in which they are passed.
        instructions: in the order in which they run; each calls at most one branch.
        outputs: names of the streams that come out.
        guarded: values that every run is to look at, whether they are numbers to divide by.
    """

    inputs: tuple[str, ...]
    branches: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[str, ...]
    guarded: frozenset[str] = frozenset()

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """The outputs, from the input streams and then the branches."""
        values = self.run(*arguments)
        return tuple(values[name] for name in self.outputs)

    def run(self, *arguments: Any) -> dict[str, Any]:
        """Every value by its name, from the input streams and then the branches."""
        expected = (*self.inputs, *self.branches)
        if len(arguments) != len(expected):
            raise RevifyError(f"Got {len(arguments)} arguments for ({', '.join(expected)}): pass just these.")
        named = dict(zip(expected, arguments, strict=True))
        values = {name: named[name] for name in self.inputs}
        branches = {name: named[name] for name in self.branches}
        for instruction in self.instructions:
            values.update(zip(instruction.results, instruction.execute(values, branches), strict=True))
        return values

    @property
    def gives(self) -> dict[str, int]:
        """For each branch, in order, how many values it gives: one where it is not called."""
        calls = {step.branch: len(step.results) for step in self.instructions if isinstance(step, Call)}
        return {name: calls.get(name, 1) for name in self.branches}

    def sources(self) -> dict[str, frozenset[str]]:
        """For every value, the inputs that it depends on."""
        sources = {name: frozenset({name}) for name in self.inputs}
        for instruction in self.instructions:
            found = frozenset[str]().union(*(sources[name] for name in names(instruction.operands)))
            sources.update((result, found) for result in instruction.results)
        return sources

    def __str__(self) -> str:
        """One line for each value that is an output, used twice, or one of several results of a branch."""
        return "\n".join(render(self).lines)


@dataclass(frozen=True, slots=True)
class Rendering:
    """A program in formula letters.

    Attributes:
        lines: the program as equations; a value that is used once stands inside the line of its user.
        formulas: for every computed value, what stands to the right of its equals sign.
        mentions: for every value, how it appears in other formulas: by name, or in full if it is used once.
    """

    lines: tuple[str, ...]
    formulas: Mapping[str, str]
    mentions: Mapping[str, str]


def render(program: Program) -> Rendering:
    """The program in formula letters."""
    uses = Counter(name for instruction in program.instructions for name in names(instruction.operands))
    lines, formulas, binding = [], {}, dict.fromkeys(program.inputs, ATOM)
    mentions = {name: name for name in program.inputs}
    for instruction in program.instructions:
        text, tightness = _right_hand_side(instruction, mentions, binding)
        results = instruction.results
        if len(results) > 1 or uses[results[0]] > 1 or results[0] in program.outputs:
            lines.append(f"{', '.join(results)} = {text}")
            mentions.update((result, result) for result in results)
            tightness = ATOM
        else:
            mentions[results[0]] = text
        formulas.update(dict.fromkeys(results, text))
        binding.update(dict.fromkeys(results, tightness))
    return Rendering(tuple(lines), formulas, mentions)


ATOM = 3  # how tightly a name or a call binds: it never needs parentheses


def _right_hand_side(
    instruction: Instruction, mentions: Mapping[str, str], binding: Mapping[str, int]
) -> tuple[str, int]:
    """The text of an instruction, and how tightly it binds."""
    texts = [mentions[o] if isinstance(o, str) else o.text for o in instruction.operands]
    if isinstance(instruction, Call):
        return f"{instruction.branch}({', '.join(texts)})", ATOM
    op = instruction.op
    if op is Op.SAME:
        return texts[0], binding[names(instruction.operands)[0]]
    for place, operand in enumerate(instruction.operands):
        needed = op.tightness + place + (op is Op.NEGATE)
        if op.tightness < ATOM and isinstance(operand, str) and binding[operand] < needed:
            texts[place] = f"({texts[place]})"
    return op.template.format(*texts), op.tightness


def names(operands: Iterable[Operand]) -> tuple[str, ...]:
    """The operands that are values, not numbers."""
    return tuple(operand for operand in operands if isinstance(operand, str))


def _look_up(operands: tuple[Operand, ...], values: Values) -> Iterator[Any]:
    return (values[operand] if isinstance(operand, str) else operand.value for operand in operands)
