"""One node of a block's graph, and its execution on named values."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands among the arguments of an operation for the value of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One node of a block's graph.

    Args:
        result: its name.
        kind: call_module, call_function, call_method or get_attr, as in torch.fx.
        target: the child's path, the function, the method's name or the attribute's path.
        args: with `Slot` for values.
        kwargs: likewise.
        last_used: names that no later operation of the segment needs.
    """

    result: str
    kind: str
    target: Any  # Any: as in torch.fx
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    last_used: tuple[str, ...]


def execute(step: Operation, block: nn.Module, values: dict[str, Any]) -> Any:
    """The result of one operation.

    Args:
        step: the operation.
        block: whose child modules and attributes it uses.
        values: by name; stays as it is.
    """
    if step.kind == "get_attr":
        return operator.attrgetter(step.target)(block)
    args, kwargs = filled(step.args, values), filled(step.kwargs, values)
    if step.kind == "call_module":
        return block.get_submodule(step.target)(*args, **kwargs)
    if step.kind == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)


def filled(value: Any, values: dict[str, Any]) -> Any:
    """The arguments with values in the slots."""
    if isinstance(value, Slot):
        return values[value.name]
    if isinstance(value, tuple | list):
        return type(value)(filled(item, values) for item in value)
    if isinstance(value, dict):
        return {name: filled(item, values) for name, item in value.items()}
    if isinstance(value, slice):
        return slice(*(filled(item, values) for item in (value.start, value.stop, value.step)))
    return value
