"""A module whose own forward adds → a program: its operations, with runs of steps on one stream among them.

    x ─ embed ─┬─ attn ─(+)─┬─ ff ─(+)─┬─ attn ─(+)─ norm ─ head → y        the forward of a container, or of the whole model
               └────────┘   └──────┘   └────────┘
      prefix    ├─ step 0 ─┤├ step 1 ─┤├─ step 2 ─┤    suffix

The container is traced with its child modules as leaves, so that their modes, hooks and random numbers stay theirs. A
step leads from one value of the stream to the next. Nothing that it computes in between is used elsewhere; what it needs
besides the stream are side inputs, as a block's are. One module that is called several times gives several steps.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from revify.errors import StreamError
from revify.reading.additions import has_side_effects
from revify.reading.chains import find_chains, steps_between
from revify.reading.operations import Operation, Slot, execute, filled
from revify.reading.own_code import Flags, Witness, changed_flag, has_generator, sizes_of
from revify.reading.roles import find_shortcut
from revify.reading.segments import argument_name, asks_for_its_mode, refuse_missing, trace_children
from revify.reading.tracing import defaults_left, meta_copy


@dataclass(frozen=True, slots=True)
class Part:
    """One step of a run; called as a block's forward, with the container as `self`, the stream, and the side inputs.

    Args:
        run: which run of the program.
        start: the name of the stream's value that goes in.
        result: of the one that comes out.
        side: the names of the other values that it needs, in order.
        operations: in order.
    """

    run: int
    start: str
    result: str
    side: tuple[str, ...]
    operations: tuple[Operation, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules that it calls, within the container."""
        return tuple(str(step.target) for step in self.operations if step.kind == "call_module")

    def __call__(self, container: nn.Module, z: Any, *side: Any) -> Any:  # Any: side inputs of every type
        values = {self.start: z, **dict(zip(self.side, side, strict=True))}
        del z, side
        for step in self.operations:
            values[step.result] = execute(step, container, values)
            for name in step.last_used:
                values.pop(name, None)
        return values[self.result]


@dataclass(frozen=True, slots=True)
class Program:
    """The forward of a container.

    Args:
        parameters: the names of its arguments, in order.
        fixed: those that had their default when it was traced.
        items: its operations and steps, in order.
        last_used: for each of them, the names that nothing after it needs.
        output: what it returns, with `Slot` for values.
        flags: the container's attributes that its code read when it was traced, by path, with what they were.
    """

    parameters: tuple[str, ...]
    fixed: Mapping[str, Any]
    items: tuple[Operation | Part, ...]
    last_used: tuple[tuple[str, ...], ...]
    output: Any
    flags: Flags = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its steps, in order."""
        return tuple(item for item in self.items if isinstance(item, Part))

    @property
    def runs(self) -> int:
        """How many runs of steps it has."""
        return len({part.run for part in self.parts})

    def __call__(
        self,
        container: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        step: Callable[[int, Part, Any, tuple[Any, ...]], Any],
    ) -> Any:
        """Run the container.

        Args:
            container: the module.
            args: its arguments by position.
            kwargs: by keyword.
            step: called for each step with its number, itself, the value of the stream and the side inputs.

        Raises:
            StreamError: an argument is given that was left at its default in the example, or an attribute was changed.
        """
        changed = changed_flag(container, self.flags)
        if changed is not None:
            raise StreamError(
                f"{type(container).__name__}.{changed[0]} is {changed[1]!r}, and was {self.flags[changed[0]]!r} when its "
                "forward was cut into steps. Set it before converting."
            )
        values = self._bound(args, kwargs)
        del args, kwargs
        number = 0
        for item, last in zip(self.items, self.last_used, strict=True):
            if isinstance(item, Part):
                side = tuple(values[name] for name in item.side)
                values[item.result] = step(number, item, values[item.start], side)
                number += 1
            else:
                values[item.result] = execute(item, container, values)
            for name in last:
                values.pop(name, None)
        return filled(self.output, values)

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = {**self.fixed, **dict(zip(self.parameters, args, strict=False)), **kwargs}
        for name, default in self.fixed.items():
            value = given[name]
            if isinstance(value, Tensor) or (value is not default and value != default):
                raise StreamError(
                    f"its argument {name} is {type(value).__name__}, and was {default!r} when the forward was cut into "
                    "steps. Plan with an example that passes it."
                )
        refuse_missing(self.parameters, given)
        return {argument_name(name): value for name, value in given.items()}


def read_program(container: nn.Module, given: Collection[int | str]) -> Program | None:
    """The program of a container with its runs; None where there is no run, or no graph of it.

    Args:
        container: any module; it stays as it is.
        given: the arguments that are tensors when it is called; the others are fixed to their defaults.
    """
    signature = inspect.signature(container.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature):
        return None
    fixed = defaults_left(signature, given)
    bare = meta_copy(container)
    before = sizes_of(bare)
    with torch.random.fork_rng(devices=[]), Witness(bare) as witness:
        graph = trace_children(bare, fixed)
    lasts = witness.draws or witness.outlasts or has_generator(container) or sizes_of(bare) != before
    if graph is None or lasts or has_side_effects(graph):
        return None
    if asks_for_its_mode(bare, graph, fixed):
        return None
    modules = dict(bare.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    chains = find_chains(graph, modules, {path for path, count in calls.items() if count > 1 and _adds(modules[path])})
    names = tuple(p.name for p in signature)
    arguments = dict(zip((n for n in graph.nodes if n.op == "placeholder"), map(argument_name, names), strict=True))
    return replace(_program(graph, chains, arguments, names, fixed), flags=witness.flags()) if chains else None


def _adds(child: nn.Module) -> bool:
    """Whether a module that is called several times adds to its first argument."""
    parameters = list(inspect.signature(child.forward).parameters.values())
    graph = trace_children(child, {p.name: p.default for p in parameters[1:] if p.default is not p.empty})
    if graph is None or not parameters:
        return False
    x = next(node for node in graph.nodes if node.op == "placeholder")
    y = next(node for node in graph.nodes if node.op == "output").args[0]
    return find_shortcut(x, y, dict(child.named_modules())) is not None


def _program(
    graph: fx.Graph,
    chains: list[list[fx.Node]],
    arguments: dict[fx.Node, str],
    names: tuple[str, ...],
    fixed: dict[str, Any],
) -> Program:
    """The graph's operations, with those of a step in place of its last."""

    def slot(node: fx.Node) -> Any:  # Any: as fx.map_arg wants it
        return Slot(arguments.get(node, node.name))

    ends: dict[fx.Node, tuple[int, fx.Node, list[fx.Node]]] = {}
    for run, chain in enumerate(chains):
        ends.update({end: (run, v, steps_between(v, end) or []) for v, end in pairwise(chain)})
    hidden = {node for _, _, inner in ends.values() for node in inner}
    items: list[tuple[Operation | Part, list[fx.Node]]] = []
    output: Any = None
    for node in graph.nodes:
        if node.op == "output":
            output = fx.map_arg(node.args[0], slot)
        elif node in ends:
            run, v, inner = ends[node]
            side = list(dict.fromkeys(used for n in inner for used in n.all_input_nodes if used not in {v, *inner}))
            operations = _operations(inner, v, slot)
            part = Part(run, slot(v).name, node.name, tuple(slot(used).name for used in side), operations)
            items.append((part, [v, *side]))
        elif node.op != "placeholder" and node not in hidden:
            items.append((_operation(node, None, slot, ()), node.all_input_nodes))
    kept = {slot(used).name for used in next(n for n in graph.nodes if n.op == "output").all_input_nodes}
    last = {slot(used).name: place for place, (_, given) in enumerate(items) for used in given}
    gone = tuple(
        tuple(name for name, final in last.items() if final == place and name not in kept)
        for place in range(len(items))
    )
    return Program(names, fixed, tuple(item for item, _ in items), gone, output)


def _operations(nodes: list[fx.Node], start: fx.Node, slot: Callable[[fx.Node], Any]) -> tuple[Operation, ...]:
    last = {slot(used).name: node for node in nodes for used in node.all_input_nodes}
    return tuple(
        _operation(node, start, slot, tuple(name for name, user in last.items() if user is node)) for node in nodes
    )


def _operation(
    node: fx.Node, start: fx.Node | None, slot: Callable[[fx.Node], Any], last_used: tuple[str, ...]
) -> Operation:
    sums = node.target is operator.iadd and node.args[0] is start
    target = operator.add if sums else node.target
    return Operation(
        node.name, node.op, target, fx.map_arg(node.args, slot), dict(fx.map_arg(node.kwargs, slot)), last_used
    )
