"""Solving: the program of a formula → the program of its inverse and the pivots of its determinant.

The outputs are known. Three moves lead from them to the inputs, and each adds to the inverse:

    undo        v = a + b,  v and b known             →   a = v − b
    evaluate    v = F(a),   a known                   →   v = F(a)
    eliminate   p = a + b,  q = a − b,  both known    →   b = (q − p) / (−2)

Why det J is the product of the pivots. Call a value open once it is solved for, until it is solved through.
The open values are coordinates of one and the same point: the outputs at first, the inputs at last. A move
that solves v = φ(a, b) for a puts a in the place of v. The known b is computed from what lies below v, so it
depends on the other coordinates only: the change is triangular, and its determinant is ∂φ/∂a, the pivot. What
is left in the end is a permutation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from revify.couplings.elimination import eliminate
from revify.couplings.explaining import Stuck, explain
from revify.couplings.intervals import LINE, Interval, interval
from revify.couplings.programs import Apply, Instruction, Op, Operand, Program, names, number


@dataclass(frozen=True, slots=True)
class Pivot:
    """∂v/∂a, elementwise, where v was solved for a.

    Attributes:
        of: v.
        factor: the pivot, or what 1 is divided by to get it.
        divides: whether the pivot is 1 / factor.
        bounds: where the pivot can lie: a point if the factor is a number; never at zero.
    """

    of: str
    factor: Operand
    divides: bool
    bounds: Interval

    @property
    def smallest(self) -> float:
        """The least that |pivot| can be."""
        return min(abs(self.bounds.low), abs(self.bounds.high))


@dataclass(frozen=True, slots=True)
class Solution:
    """The inverse, the pivots in the order of the formula, and whether an odd permutation is left."""

    inverse: Program
    pivots: tuple[Pivot, ...]
    odd: bool


def solve(forward: Program) -> Solution | Stuck:
    """The inverse of a program, or why none is found."""
    search = Search(forward)
    while not search.known.issuperset(forward.inputs):
        if not (search.undo() or search.evaluate() or search.eliminate()):
            return explain(forward, search.open, search.known, search.bounds)
    instructions = tuple(search.instructions)
    inverse = Program(forward.outputs, forward.branches, instructions, forward.inputs, forward.guarded)
    places = [search.open[name] for name in forward.inputs]
    crossings = sum(a > b for a, b in itertools.combinations(places, 2))
    return Solution(inverse, tuple(reversed(search.pivots)), odd=crossings % 2 == 1)


@dataclass(frozen=True, slots=True)
class Undo:
    """What solves v = φ(a, b) for a: an operation on v and b; and ∂v/∂a, as a factor that may divide."""

    op: Op
    operands: tuple[Operand, ...]
    factor: Operand
    divides: bool = False


def undo(definition: Apply, unknown: str) -> Undo | None:
    """What solves a definition for an unknown that it holds once, if anything does."""
    v, a_first = definition.result, definition.operands[0] == unknown
    b = definition.operands[-1] if a_first else definition.operands[0]
    match definition.op, a_first:
        case Op.SAME, _:  #                v = a
            return Undo(Op.SAME, (v,), number(1))
        case Op.NEGATE, _:  #              v = −a
            return Undo(Op.NEGATE, (v,), number(-1))
        case Op.ADD, _:  #                 v = a + b
            return Undo(Op.SUBTRACT, (v, b), number(1))
        case Op.SUBTRACT, True:  #         v = a − b
            return Undo(Op.ADD, (v, b), number(1))
        case Op.SUBTRACT, False:  #        v = b − a
            return Undo(Op.SUBTRACT, (b, v), number(-1))
        case Op.MULTIPLY, _:  #            v = a·b
            return Undo(Op.DIVIDE, (v, b), b)
        case Op.DIVIDE, True:  #           v = a / b
            return Undo(Op.MULTIPLY, (v, b), b, divides=True)
    return None


class Search:
    """A solution in the making.

    Attributes:
        known: the values that the instructions give so far.
        open: the coordinates, each with the place of the output that it came from.
    """

    def __init__(self, forward: Program) -> None:
        self.forward = forward
        self.definitions = {name: step for step in forward.instructions for name in step.results}
        self.bounds = bounds(forward)
        self.open = {name: place for place, name in enumerate(forward.outputs)}
        self.known = set(forward.outputs)
        self.instructions: list[Instruction] = []
        self.pivots: list[Pivot] = []

    def undo(self) -> bool:
        """Solve an open value for the only unknown in its definition."""
        for value in self.open:
            definition, unknowns = self.definitions.get(value), self.unknowns(value)
            if isinstance(definition, Apply) and len(unknowns) == 1:
                move = undo(definition, unknowns[0])
                if move and self.bound(move.factor).invertible:
                    step = Apply(unknowns[0], move.op, move.operands, undoes=value)
                    return self.solved(step, factor=move.factor, divides=move.divides)
        return False

    def evaluate(self) -> bool:
        """Compute a value from operands that are known."""
        for step in self.forward.instructions:
            if not self.known.issuperset(step.results) and self.known.issuperset(names(step.operands)):
                self.instructions.append(step)
                self.known.update(step.results)
                return True
        return False

    def eliminate(self) -> bool:
        """Take apart two open values that mix their unknowns linearly."""
        in_order = [name for name in self.definitions if name in self.open]
        steps = eliminate(in_order, self.definitions, self.known)
        return bool(steps) and self.solved(*steps, factor=steps[-1].operands[1])

    def solved(self, *steps: Apply, factor: Operand, divides: bool = False) -> bool:
        """The last of the steps gives an unknown, which takes the place of the value it undoes."""
        value, bounds = str(steps[-1].undoes), self.bound(factor)
        self.instructions += steps
        self.known.update(step.result for step in steps)
        self.open[steps[-1].result] = self.open.pop(value)
        self.pivots.append(Pivot(value, factor, divides, bounds.reciprocal() if divides else bounds))
        return True

    def unknowns(self, value: str) -> list[str]:
        """What is not known in the definition of a value, as often as it stands there."""
        definition = self.definitions.get(value)
        return [name for name in names(definition.operands) if name not in self.known] if definition else []

    def bound(self, operand: Operand) -> Interval:
        """Where the operand can lie."""
        return self.bounds[operand] if isinstance(operand, str) else interval(operand.value)


def bounds(program: Program) -> dict[str, Interval]:
    """Where each value can lie, whatever the streams are and the branches give, in a run that guards do not refuse."""
    found: dict[str, Interval] = dict.fromkeys(program.inputs, LINE)
    for step in program.instructions:
        if isinstance(step, Apply):
            (bound,) = step.execute(found, {})
            found[step.result] = bound.guarded() if step.result in program.guarded else bound
        else:
            found.update(dict.fromkeys(step.results, LINE))
    return found
