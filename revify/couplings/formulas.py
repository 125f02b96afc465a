"""Formulas: a Python function in formula letters → a `Program`, by running it once on symbols of torch.fx.

    def damped(x1, x2, F, G, gamma=0.5):     streams, then branches, then constants: numbers by default
        y1 = gamma * x1 + F(x2)
        y2 = gamma * x2 + G(y1)
        return y1, y2                        one value for each stream; they are called y1, y2, … by position

Other values keep the letters of the function's variables. An operation that the table below does not know is
refused with its line. A program only computes: `y += x` in a formula leaves the tensor that y was as it is.
"""

from __future__ import annotations

import inspect
import itertools
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

from revify.couplings.guarding import guarded
from revify.couplings.programs import Apply, Call, Constant, Instruction, Op, Operand, Program, fold, names, number
from revify.errors import RefusalError

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
ONLY = "A coupling knows +, −, *, /, exp, tanh, sigmoid and calls of branches: put the rest into a branch."


def record(formula: Formula) -> Program:
    """The program of a formula, without what its outputs do not need.

    Args:
        formula: a function of streams, branches and constants, which returns one value for each stream.

    Returns:
        Its program.

    Raises:
        RefusalError: the formula does something that a program cannot say.
    """
    recorder = _Recorder(formula)
    returned = recorder.run()
    if not isinstance(returned, tuple | list) or len(returned) < 2:
        raise refusal(formula, "it does not return a value for each stream", "Return a tuple (y1, y2).")
    for value in returned:
        if not isinstance(value, Proxy):
            raise refusal(formula, f"it returns {value!r}, which is no stream", "Return the new streams.")
    return _Reader(recorder, tuple(value.node for value in returned)).program()


def refusal(formula: Formula, fact: str, remedy: str, line: int | None = None) -> RefusalError:
    """A refusal that says which formula it is about, and where that stands."""
    function = function_of(formula)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    place = f" ({Path(code.co_filename).name}, line {line or code.co_firstlineno})" if code else ""
    return RefusalError(f"Coupling {name_of(formula)}{place}: {fact}. {remedy}")


def name_of(formula: Formula) -> str:
    """The name of the function."""
    function = function_of(formula)
    return getattr(function, "__name__", type(function).__name__)


def function_of(formula: Formula) -> Formula:
    """The function that a partial one calls."""
    while isinstance(formula, partial):
        formula = formula.func
    return formula


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
                raise refusal(formula, f"{parameter} is any number of values", "Write out the parameters.")
            self.symbols[name] = Proxy(self.graph.placeholder(name), self)
            if parameter.default is not parameter.empty:
                self.constants[name] = self._constant(name, parameter.default)

    def _constant(self, name: str, value: object) -> Constant:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise refusal(self.formula, f"the default of {name} is {value!r}", "Constants are numbers.")
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
        self.callables = {nodes[name]: name for name in self.branches}
        self.values: dict[Node, Operand] = {nodes[name]: name for name in self.inputs}
        self.values |= {nodes[name]: constant for name, constant in recorder.constants.items()}
        self.taken = set(self.inputs)
        self.results = tuple(self.unused(f"y{place}") for place in range(1, len(outputs) + 1))
        self.counts: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self.guarded: set[str] = set()

    def program(self) -> Program:
        live = _ancestors(self.outputs)
        for node in self.recorder.graph.nodes:
            if node in live and node not in self.values and node not in self.callables:
                self.read(node)
        for result, node in zip(self.results, self.outputs, strict=True):
            value = self.operand(node, node)
            if isinstance(value, Constant):
                fact = f"it returns {value.text}, which is no stream"
                raise self.refusal(node, fact, "Return the new streams.")
            if value != result:  # a stream handed on, or a value returned twice
                self.instructions.append(Apply(result, Op.SAME, (value,)))
        return Program(self.inputs, self.branches, tuple(self.instructions), self.results, frozenset(self.guarded))

    def read(self, node: Node) -> None:
        """Append the node's instruction, or fold it into a constant."""
        if node.op == "call_method" and node.target == "__call__":
            return self.read_call(node)
        if node.target is guarded:
            self.values[node] = factor = self.operand(node.args[0], node)
            self.guarded |= set(names([factor]))
            return None
        function = getattr(torch, str(node.target), None) if node.op == "call_method" else node.target
        op = OPERATIONS.get(function)
        if op is None or node.kwargs or len(node.args) != op.arity:
            name = getattr(node.target, "__name__", node.target)
            options = f" with {', '.join(node.kwargs)}" if node.kwargs else ""
            raise self.refusal(node, f"{name}{options} is not an operation that can be solved through", ONLY)
        operands = tuple(self.operand(argument, node) for argument in node.args)
        constants = [operand for operand in operands if isinstance(operand, Constant)]
        if len(constants) == len(operands):
            self.values[node] = fold(op, *constants)
        else:
            self.values[node] = name = self.name(node)
            self.instructions.append(Apply(name, op, operands))

    def read_call(self, node: Node) -> None:
        """Append the call of a branch, with a name for each value that the formula unpacks from it."""
        function, *arguments = node.args
        branch = self.callables.get(function) if isinstance(function, Node) else None
        if branch is None or node.kwargs:
            called = f"{branch} with {', '.join(node.kwargs)}=" if branch else self.letter(function)
            raise self.refusal(
                node,
                f"it calls {called}, but its streams are {' and '.join(self.inputs)}, as many as it returns, "
                "and only what follows them is called, with values",
                "Put the streams first, and bind anything else that a branch needs before you pass it.",
            )
        items = _items(node)
        if items and (len(items) < 2 or sorted(items) != list(range(len(node.users)))):
            fact = f"it takes single values of {branch}"
            raise self.refusal(node, fact, f"Unpack all of them, as in s, t = {branch}(x2).")
        if self.counts.setdefault(branch, len(items)) != len(items):
            raise self.refusal(node, f"it does not unpack {branch} alike in all places", "Do so everywhere.")
        results = [items[place] for place in sorted(items)] or [node]
        names = tuple(self.name(result) for result in results)
        self.values |= dict(zip(results, names, strict=True))
        operands = tuple(self.operand(argument, node) for argument in arguments)
        self.instructions.append(Call(names, branch, operands))

    def operand(self, argument: object, node: Node) -> Operand:
        """The value or number that a node is computed from."""
        if isinstance(argument, Node) and argument in self.values:
            return self.values[argument]
        if isinstance(argument, int | float) and not isinstance(argument, bool):
            return number(argument)
        raise self.refusal(
            node,
            f"it computes with {self.letter(argument)}",
            "Compute with streams, results of branches, and numbers only.",
        )

    def letter(self, argument: object) -> str:
        """What the formula calls an argument that is no value."""
        if isinstance(argument, Node):
            return self.recorder.letters.get(argument) or argument.name
        return f"a {type(argument).__name__}"

    def name(self, node: Node) -> str:
        """The value's name: its place among the outputs, or the formula's letter for it, or v1, v2, …"""
        if node in self.outputs:
            return self.results[self.outputs.index(node)]
        plain = (f"v{place}" for place in itertools.count(1))
        return self.unused(self.recorder.letters.get(node) or next(v for v in plain if v not in self.taken))

    def unused(self, name: str) -> str:
        """The name, with as many primes as it takes to be new."""
        while name in self.taken:
            name += "′"
        self.taken.add(name)
        return name

    def refusal(self, node: Node, fact: str, remedy: str) -> RefusalError:
        return refusal(self.recorder.formula, fact, remedy, self.recorder.lines.get(node))


def _items(node: Node) -> dict[int, Node]:
    """The values that are taken out of a tuple, by their place in it."""
    found: dict[int, Node] = {}
    for user in node.users:
        if user.target is operator.getitem and isinstance(place := user.args[1], int):
            found[place] = user
    return found


def _ancestors(nodes: tuple[Node, ...]) -> set[Node]:
    """The nodes, and all that they are computed from."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
