"""Programs: a formula as a list of elementary instructions, to be run, solved and printed.

    y1 = x1 + F(x2)      →      Call   v1 = F(x2)
                                Apply  y1 = x1 + v1

Every value has a name and is computed once. A formula and its inverse share the names: what is `v1` on the way
forward is `v1` on the way back, so whatever was kept for a value on the one way is found on the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from operator import add, methodcaller, mul, neg, sub, truediv
from typing import Any

from revify.errors import RevifyError


class Op(Enum):
    """An elementary operation: how it prints, and how tightly it binds."""

    SAME = "{}", 3
    ADD = "{} + {}", 1
    SUBTRACT = "{} − {}", 1
    NEGATE = "−{}", 1
    MULTIPLY = "{}·{}", 2
    DIVIDE = "{} / {}", 2
    EXP = "exp({})", 3
    TANH = "tanh({})", 3
    SIGMOID = "sigmoid({})", 3

    def __call__(self, *operands: Any) -> Any:
        """The operation on tensors, numbers, or anything else that has these operators."""
        return COMPUTE[self](*operands)


COMPUTE: Mapping[Op, Callable[..., Any]] = {  # Any: tensors, numbers and intervals alike
    Op.SAME: lambda value: value,
    Op.ADD: add,
    Op.SUBTRACT: sub,
    Op.NEGATE: neg,
    Op.MULTIPLY: mul,
    Op.DIVIDE: truediv,
    Op.EXP: methodcaller("exp"),
    Op.TANH: methodcaller("tanh"),
    Op.SIGMOID: methodcaller("sigmoid"),
}


@dataclass(frozen=True, slots=True)
class Constant:
    """A number, under the letter it has in the formula."""

    text: str
    value: float


Operand = str | Constant  # the name of a value, or a number


@dataclass(frozen=True, slots=True)
class Call:
    """`results = branch(operands)`; where a branch gives one value, `results` has one name."""

    results: tuple[str, ...]
    branch: str
    operands: tuple[Operand, ...]

    def execute(self, values: Mapping[str, Any], branches: Mapping[str, Callable[..., Any]]) -> tuple[Any, ...]:
        """The results, in order, from the values named so far."""
        result = branches[self.branch](*_look_up(self.operands, values))
        if len(self.results) == 1:
            return (result,)
        if not isinstance(result, tuple | list) or len(result) != len(self.results):
            raise RevifyError(
                f"Branch {self.branch} gave {_describe(result)} where the coupling unpacks {len(self.results)} values "
                f"({', '.join(self.results)}): return a tuple of {len(self.results)} tensors from it."
            )
        return tuple(result)


@dataclass(frozen=True, slots=True)
class Apply:
    """`result = op(operands)`.

    Attributes:
        undoes: in an inverse, the value whose definition was solved for `result`; None where the instruction is
            the same as in the formula.
    """

    result: str
    op: Op
    operands: tuple[Operand, ...]
    undoes: str | None = None

    @property
    def results(self) -> tuple[str, ...]:
        return (self.result,)

    def execute(self, values: Mapping[str, Any], branches: Mapping[str, Callable[..., Any]]) -> tuple[Any, ...]:
        """The result, from the values named so far."""
        return (self.op(*_look_up(self.operands, values)),)


Instruction = Call | Apply


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions that lead from the inputs to the outputs.

    Calling it runs it: `program(*inputs, *branches)` gives the outputs. A runtime that wants to do more at each
    instruction (record gradients around a branch, keep residue bits) walks over `instructions` itself.

    Attributes:
        inputs: names of the streams that go in.
        branches: names of the branches, in the order in which they are passed.
        instructions: in the order in which they run; each branch call appears once.
        outputs: names of the streams that come out.
    """

    inputs: tuple[str, ...]
    branches: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[str, ...]

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """The outputs, from the input streams and then the branches."""
        values = self.run(*arguments)
        return tuple(values[name] for name in self.outputs)

    def run(self, *arguments: Any) -> dict[str, Any]:
        """Every value by its name, from the input streams and then the branches."""
        streams, branches = arguments[: len(self.inputs)], arguments[len(self.inputs) :]
        values = dict(zip(self.inputs, streams, strict=True))
        by_name = dict(zip(self.branches, branches, strict=True))
        for instruction in self.instructions:
            values.update(zip(instruction.results, instruction.execute(values, by_name), strict=True))
        return values

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
        mentions: for every value, how it appears inside other formulas: by name, or in full if it is used once.
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
    template, tightness = instruction.op.value
    if instruction.op is Op.SAME:
        return texts[0], binding[names(instruction.operands)[0]]
    needed = tightness + (instruction.op is Op.NEGATE)
    for place, operand in enumerate(instruction.operands):
        if tightness < ATOM and isinstance(operand, str) and binding[operand] < needed + place:
            texts[place] = f"({texts[place]})"
    return template.format(*texts), tightness


def names(operands: tuple[Operand, ...]) -> tuple[str, ...]:
    """The operands that are values, not numbers."""
    return tuple(operand for operand in operands if isinstance(operand, str))


def _look_up(operands: tuple[Operand, ...], values: Mapping[str, Any]) -> Iterator[Any]:
    return (values[operand] if isinstance(operand, str) else operand.value for operand in operands)


def _describe(result: object) -> str:
    return f"{len(result)} values" if isinstance(result, tuple | list) else f"one {type(result).__name__}"
