"""A block → its segments: one for each residual addition, each run through the block's own child modules.

    x ─┬─ norm1 ─ attn ─(+)─┬─ norm2 ─ mlp ─(+)→ y
       └────────────────┘   └───────────────┘
    └───── segment 0 ─────┘└──── segment 1 ────┘

The block is traced with its child modules as leaves, so that their modes, hooks and random numbers stay theirs. A cut
is an addition through which every path from x to y goes, and which a shortcut leads to from the cut before it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from revify.errors import StreamError
from revify.reading.additions import Joint, find_ends, find_joints, has_side_effects
from revify.reading.operations import Operation, Slot, execute
from revify.reading.own_code import Flags, Witness, changed_flag, has_generator
from revify.reading.roles import dependent_on
from revify.reading.tracing import defaults_left, meta_copy


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a block between two values of its stream; called as its forward, with the block as `self`.

    Args:
        stream: the block's argument that is the stream, a position or a keyword.
        parameters: the names of the block's arguments, in order.
        fixed: those that had their default when the block was traced.
        flags: the block's attributes that its code read when it was traced, by path, with what they were.
        start: the name of the segment's input, among the operations'.
        operations: in order; the last gives the segment's output.
    """

    stream: int | str
    parameters: tuple[str, ...]
    fixed: Mapping[str, Any]
    flags: Flags
    start: str
    operations: tuple[Operation, ...]

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        for name, default in self.fixed.items():
            value = given.get(name, default)
            if isinstance(value, Tensor) or (value is not default and value != default):
                raise StreamError(
                    f"its argument {name} is {type(value).__name__}, and was {default!r} when the block was cut into "
                    'its branches. Plan with an example that passes it, or with unit="block".'
                )
        refuse_missing(self.parameters, given.keys() | self.fixed.keys())
        changed = changed_flag(block, self.flags)
        if changed is not None:
            raise StreamError(
                f"{type(block).__name__}.{changed[0]} is {changed[1]!r}, and was {self.flags[changed[0]]!r} when the block was "
                "cut into its branches, whose code is what it was then. Set it before converting, or convert the whole "
                'block: unit="block".'
            )
        stream = self.parameters[self.stream] if isinstance(self.stream, int) else self.stream
        values = {argument_name(name): value for name, value in given.items()}
        values[self.start] = values.pop(argument_name(stream))
        for step in self.operations:
            values[step.result] = execute(step, block, values)
            for name in step.last_used:
                values.pop(name, None)
        return values[self.operations[-1].result]


@dataclass(frozen=True, slots=True)
class BranchCode:
    """A residual branch of a block, without its shortcut.

    Args:
        run: x → f(x).
        activation: what a post-activation block does to the sum; None where it does nothing.
    """

    run: Segment
    activation: Segment | None


def find_segments(block: nn.Module, stream: int | str, given: Collection[int | str]) -> tuple[Segment, ...]:
    """The segments of a block.

    Args:
        block: a residual block; it stays as it is.
        stream: which argument is the stream, a position or a keyword.
        given: the arguments that are tensors when the block is called; the others are fixed to their defaults.

    Returns:
        The segments in order, at least two, or none where the block cannot be cut.
    """
    reading = _read(block, stream, given)
    if reading is None:
        return ()
    ends = list(pairwise(find_ends(reading.graph, reading.x, reading.modules)))
    parts = [_between(reading.graph, reading.x, start, end) for start, end in ends]
    if any(part is None for part in parts):
        return ()
    return tuple(
        reading.segment(start, _operations(part, reading.x, start, reading.arguments))
        for (start, _), part in zip(ends, parts, strict=True)
        if part is not None
    )


def find_branches(block: nn.Module, stream: int | str, given: Collection[int | str]) -> tuple[BranchCode, ...]:
    """The residual branches of a block, in order; none where they cannot be told apart. Arguments as for `find_segments`."""
    reading = _read(block, stream, given)
    if reading is None or has_side_effects(reading.graph):
        return ()
    y = next(node for node in reading.graph.nodes if node.op == "output").args[0]
    if not isinstance(y, fx.Node):
        return ()
    found = []
    for joint in find_joints(reading.x, y, reading.modules):
        end = joint.addition if joint.activated else joint.end
        nodes = _between(reading.graph, reading.x, joint.start, end, {joint.addition: [joint.branch]})
        if nodes is None:
            return ()
        own = _operations(nodes, reading.x, joint.start, reading.arguments)
        run = reading.segment(
            joint.start, tuple(_alone(o, joint) if o.result == joint.addition.name else o for o in own)
        )
        tail = _operations(list(joint.tail), reading.x, joint.addition, reading.arguments)
        found.append(BranchCode(run, reading.segment(joint.addition, tail) if joint.activated else None))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Reading:
    """A block's graph, with its children as leaves."""

    graph: fx.Graph
    x: fx.Node
    modules: dict[str, nn.Module]
    stream: int | str
    parameters: tuple[str, ...]
    fixed: dict[str, Any]
    flags: Flags
    arguments: dict[fx.Node, str]

    def segment(self, start: fx.Node, operations: tuple[Operation, ...]) -> Segment:
        """Operations on the value at `start`."""
        name = self.arguments.get(start, start.name)
        return Segment(self.stream, self.parameters, self.fixed, self.flags, name, operations)


def _read(block: nn.Module, stream: int | str, given: Collection[int | str]) -> _Reading | None:
    """The graph of a block; None where there is none, or where it is not all that the block does.

    So it is where the block asks for its mode or for gradients, which a graph cannot; where the graph depends on random
    numbers that were drawn while it was made; and where the block's code sets something at each call.
    """
    signature = inspect.signature(block.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature):
        return None
    fixed = defaults_left(signature, given)
    bare = meta_copy(block)
    with torch.random.fork_rng(devices=[]), Witness(bare) as witness:
        graph = trace_children(bare, fixed)
    if graph is None or witness.draws or witness.changes or has_generator(block):
        return None
    if asks_for_its_mode(bare, graph, fixed):
        return None
    names = tuple(p.name for p in signature)
    inputs = dict(zip(names, (node for node in graph.nodes if node.op == "placeholder"), strict=True))
    x = inputs[names[stream] if isinstance(stream, int) else stream]
    arguments = {node: argument_name(name) for name, node in inputs.items()}
    return _Reading(graph, x, dict(bare.named_modules()), stream, names, fixed, witness.flags(), arguments)


def _alone(addition: Operation, joint: Joint) -> Operation:
    """The residual addition without its shortcut."""
    used = tuple(name for name in addition.last_used if name == joint.branch.name)
    return replace(
        addition, kind="call_function", target=_same, args=(Slot(joint.branch.name),), kwargs={}, last_used=used
    )


def _same(value: Any) -> Any:
    return value


class _Tracer(fx.Tracer):
    """Torch.fx's tracer with every child module as a leaf, and timm's functions that it must not enter."""

    def __init__(self) -> None:
        from timm import layers  # here: importing timm takes seconds, and only tracing needs it

        super().__init__(autowrap_functions=tuple(layers.get_notrace_functions()), param_shapes_constant=True)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_children(block: nn.Module, fixed: dict[str, Any]) -> fx.Graph | None:
    try:
        return _Tracer().trace(block, concrete_args=fixed or None)
    except Exception:  # fx runs the block's own code on proxies: it may fail in any way
        return None


def _between(
    graph: fx.Graph,
    x: fx.Node,
    start: fx.Node,
    end: fx.Node,
    inputs: Mapping[fx.Node, list[fx.Node]] | None = None,
) -> list[fx.Node] | None:
    """What leads from one node to another, in order; None where it needs a value from before the start.

    `inputs` says of which of its inputs a node is computed, where that is not all of them.
    """
    needed, pending = {x, start}, [end]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += (inputs or {}).get(node, node.all_input_nodes)
    nodes = [n for n in graph.nodes if n in needed and n not in (x, start) and n.op != "placeholder"]
    before = dependent_on(x) - dependent_on(start) if start is not x else set()
    return None if before.intersection(nodes) else nodes


def _operations(
    nodes: list[fx.Node], x: fx.Node, start: fx.Node, arguments: dict[fx.Node, str]
) -> tuple[Operation, ...]:
    """The nodes as operations. Of x a later segment takes only the size, which is that of its own start."""

    def slot(node: fx.Node) -> Any:
        node = start if node is x else node
        return Slot(arguments.get(node, node.name))

    last = {slot(used).name: node for node in nodes for used in node.all_input_nodes}
    return tuple(
        Operation(
            node.name,
            node.op,
            _out_of_place(node, start),
            fx.map_arg(node.args, slot),
            dict(fx.map_arg(node.kwargs, slot)),
            tuple(name for name, user in last.items() if user is node),
        )
        for node in nodes
    )


def _out_of_place(node: fx.Node, start: fx.Node) -> Any:
    """`x += branch(x)` would change the stream, which the segment before it gave: add instead."""
    return operator.add if node.target is operator.iadd and node.args[0] is start else node.target


def asks_for_its_mode(bare: nn.Module, graph: fx.Graph, fixed: dict[str, Any]) -> bool:
    """Whether a module's code is another one in eval mode and without gradients, which a graph cannot be.

    Args:
        bare: the module without data; it is in eval mode afterwards.
        graph: of it as it was.
        fixed: the arguments that were constants.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return str(graph) != str(trace_children(bare.eval(), fixed))


def refuse_missing(parameters: Iterable[str], known: Collection[str]) -> None:
    """Refuse a call without an argument that was a tensor when the module was cut.

    Raises:
        StreamError: one of the parameters is not known.
    """
    missing = next((name for name in parameters if name not in known), None)
    if missing is not None:
        raise StreamError(
            f"its argument {missing} is missing, and was a tensor when the module was cut into steps. Pass it, or plan with "
            "an example that leaves it out."
        )


def argument_name(name: str) -> str:
    """The name of an argument's value: no operation has it."""
    return f"argument {name}"
