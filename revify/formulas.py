"""Formulas: a Python function written in formula letters → a `Program`, by running it once on torch.fx symbols.

    def damped(x1, x2, F, G, gamma=0.5):     streams, then branches, then constants: numbers by default
        y1 = gamma * x1 + F(x2)
        y2 = gamma * x2 + G(y1)
        return y1, y2                        one value for each stream; they are called y1, y2, … by position

Other values keep the letters of the function's local variables. An operation that the table below does not know is
refused with its line. A program only computes: `y += x` in a formula leaves the tensor that y was as it is.
"""

from __future__ import annotations

import inspect
import operator
import sys
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer, TraceError

from revify.errors import RefusalError
from revify.programs import Apply, Call, Constant, Instruction, Op, Operand, Program

Formula = Callable[..., tuple[Tensor, ...]]

OPERATIONS: Mapping[object, Op] = {
    operator.add: Op.ADD,
    torch.add: Op.ADD,
    operator.sub: Op.SUBTRACT,
    torch.sub: Op.SUBTRACT,
    operator.neg: Op.NEGATE,
    torch.neg: Op.NEGATE,
    operator.mul: Op.MULTIPLY,
    torch.mul: Op.MULTIPLY,
    operator.truediv: Op.DIVIDE,
    torch.div: Op.DIVIDE,
    torch.exp: Op.EXP,
    torch.tanh: Op.TANH,
    torch.sigmoid: Op.SIGMOID,
}
ONLY = "A coupling is written with +, −, *, /, exp, tanh, sigmoid and calls of its branches: put the rest into a branch."


def record(formula: Formula) -> Program:
    """The program of a formula, without what its outputs do not need.

    Args:
        formula: a function of streams, then branches, then constants; it returns as many values as it has streams.

    Returns:
        Its program.

    Raises:
        RefusalError: the formula does something that a program cannot say.
    """
    recorder = _Recorder(formula)
    returned = recorder.run()
    if not isinstance(returned, tuple | list) or len(returned) < 2:
        raise refusal(formula, "it does not return one value for each stream", "Return a tuple such as (y1, y2).")
    for value in returned:
        if not isinstance(value, Proxy):
            raise refusal(formula, f"it returns {value!r}, which no stream goes into", "Return the new streams.")
    return _Reader(recorder, tuple(value.node for value in returned)).program()


def refusal(formula: Formula, fact: str, remedy: str, line: int | None = None) -> RefusalError:
    """A refusal that says which formula it is about, and where that stands."""
    while isinstance(formula, partial):
        formula = formula.func
    code = getattr(formula, "__code__", None) or getattr(type(formula).__call__, "__code__", None)
    name = getattr(formula, "__name__", type(formula).__name__)
    place = f" ({Path(code.co_filename).name}, line {line or code.co_firstlineno})" if code else ""
    return RefusalError(f"Coupling {name}{place}: {fact}. {remedy}")


class _Recorder(GraphAppendingTracer):
    """Runs the formula on symbols, and notes the line of each node and the letter of each variable."""

    def __init__(self, formula: Formula) -> None:
        super().__init__(Graph())
        self.formula = formula
        self.symbols: dict[str, Proxy] = {}
        self.constants: dict[str, Constant] = {}
        self.lines: dict[Node, int] = {}
        self.letters: dict[Node, str] = {}
        for name, parameter in inspect.signature(formula).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise refusal(formula, f"{parameter} may be any number of streams", "Write out its parameters.")
            self.symbols[name] = Proxy(self.graph.placeholder(name), self)
            if parameter.default is not parameter.empty:
                self.constants[name] = self._constant(name, parameter.default)

    def _constant(self, name: str, value: object) -> Constant:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise refusal(self.formula, f"the default of {name} is {value!r}", "A constant of a coupling is a number.")
        try:
            return Constant(unicodedata.lookup(f"GREEK SMALL LETTER {name}"), value)
        except KeyError:
            return Constant(name, value)

    def run(self) -> object:
        """What the formula returns."""
        free = [symbol for name, symbol in self.symbols.items() if name not in self.constants]
        try:
            return self.formula(*free, **{name: self.symbols[name] for name in self.constants})
        except Exception as error:  # whatever a user's function may raise when it is given symbols
            inner = error.__traceback__.tb_next if error.__traceback__ else None
            fact = (
                "it decides by the values of a stream (if, while, for, assert)"
                if isinstance(error, TraceError)
                else f"it does not run on symbols ({type(error).__name__}: {error})"
            )
            raise refusal(self.formula, fact, ONLY, inner.tb_lineno if inner else None) from error

    def create_node(self, *args: Any, **kwargs: Any) -> Node:  # Any: passed on as they are
        frame = sys._getframe()
        while frame.f_back and frame.f_back.f_code is not _Recorder.run.__code__:
            frame = frame.f_back
        for letter, value in frame.f_locals.items():
            if isinstance(value, Proxy):
                self.letters.setdefault(value.node, letter)
        node = super().create_node(*args, **kwargs)
        self.lines[node] = frame.f_lineno
        return node


class _Reader:
    """Reads a recorded graph into instructions."""

    def __init__(self, recorder: _Recorder, outputs: tuple[Node, ...]) -> None:
        self.recorder, self.outputs = recorder, outputs
        free = [name for name in recorder.symbols if name not in recorder.constants]
        self.inputs, self.branches = tuple(free[: len(outputs)]), tuple(free[len(outputs) :])
        nodes = {name: symbol.node for name, symbol in recorder.symbols.items()}
        self.called = {nodes[name]: name for name in self.branches}
        self.values: dict[Node, Operand] = {nodes[name]: name for name in self.inputs}
        self.values |= {nodes[name]: constant for name, constant in recorder.constants.items()}
        self.taken = set(self.inputs)
        self.instructions: list[Instruction] = []

    def program(self) -> Program:
        results = tuple(self.unique(f"y{place}") for place in range(1, len(self.outputs) + 1))
        letters = self.recorder.letters
        letters |= dict(zip(reversed(self.outputs), reversed(results), strict=True))
        live = _ancestors(self.outputs)
        for node in self.recorder.graph.nodes:
            if node in live and node not in self.values and node not in self.called:
                self.read(node)
        for result, node in zip(results, self.outputs, strict=True):
            value = self.operand(node, node)
            if isinstance(value, Constant):
                raise self.refusal(node, f"it returns {value.text}, which no stream goes into", "Return the new streams.")
            if value != result:  # a stream handed on, or a value returned twice
                self.instructions.append(Apply(result, Op.SAME, (value,)))
        return Program(self.inputs, self.branches, tuple(self.instructions), results)

    def read(self, node: Node) -> None:
        """Append the node's instruction, or fold it into a constant."""
        if node.op == "call_method" and node.target == "__call__":
            return self.read_call(node)
        target = getattr(torch, str(node.target), None) if node.op == "call_method" else node.target
        op = OPERATIONS.get(target)
        if op is None or node.kwargs or len(node.args) != op.arity:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            options = f" with {', '.join(node.kwargs)}" if node.kwargs else ""
            raise self.refusal(node, f"the operation {name}{options} is not one that can be solved through", ONLY)
        operands = tuple(self.operand(argument, node) for argument in node.args)
        if all(isinstance(operand, Constant) for operand in operands):
            self.values[node] = _fold(op, operands)
        else:
            self.values[node] = self.name(node)
            self.instructions.append(Apply(self.name(node), op, operands))
        return None
