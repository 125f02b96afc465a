"""What the operations of a graph do to values: add, move, scale, normalise, activate; and what lies on a shortcut."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional


class Shortcut(StrEnum):
    """What lies on the way from the input of a residual block to its output."""

    IDENTITY = "identity"
    SCALED = "scaled"
    POST_ACTIVATION = "post-activation"
    POST_NORM = "post-norm"


ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
SCALINGS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIVISIONS = {operator.truediv, operator.itruediv, torch.div, "truediv", "div", "div_"}
MOVES: set[Any] = {
    operator.getitem,
    *(torch.reshape, torch.permute, torch.transpose, torch.flatten, torch.squeeze, torch.unsqueeze, torch.roll),
    *(torch.cat, torch.chunk, torch.split, torch.unbind, torch.movedim, torch.swapaxes, torch.narrow, functional.pad),
    *(
        "getitem",
        "select_result",
        "view",
        "reshape",
        "permute",
        "transpose",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
    ),
    "contiguous",
    *("roll", "movedim", "swapaxes", "narrow", "chunk", "split", "unbind", "to", "float", "type_as", "clone"),
}
ACTIVATIONS: set[Any] = {
    *(functional.relu, functional.relu_, functional.gelu, functional.silu, functional.leaky_relu, functional.hardswish),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh"),
}
WITHOUT_VALUES = {"size", "dim", "numel"}
ATTRIBUTES_WITHOUT_VALUES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "itemsize"}


def find_shortcut(x: Any, y: Any, modules: dict[str, nn.Module]) -> Shortcut | None:
    """What lies on the shortcut from node x to node y, or None where there is no shortcut."""
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return None
    dependent = dependent_on(x)
    seen: set[tuple[fx.Node, bool]] = set()
    paths: list[tuple[fx.Node, bool, Shortcut]] = [(y, False, Shortcut.IDENTITY)]
    while paths:
        node, added, found = paths.pop()
        if node is x:
            if added:
                return found
            continue
        if (node, added) in seen or node not in dependent:
            continue
        seen.add((node, added))
        role = role_of(node, modules)
        operands = [n for n in node.all_input_nodes if n in dependent]
        if role == "add":
            paths += [(n, True, found) for n in operands]
        elif role == "move":
            paths += [(n, added, found) for n in operands]
        elif role == "scale" and len(operands) == 1 and (node.target in SCALINGS or operands[0] is node.args[0]):
            paths.append((operands[0], added, max(found, Shortcut.SCALED, key=_weight)))
        elif role in (Shortcut.POST_ACTIVATION, Shortcut.POST_NORM):
            paths += [(n, False, max(found, Shortcut(role), key=_weight)) for n in operands[:1]]
    return None


def _weight(shortcut: Shortcut) -> int:
    return list(Shortcut).index(shortcut)


def dependent_on(x: fx.Node) -> set[fx.Node]:
    """The nodes whose values follow from x (sizes and types do not count as values)."""
    found, pending = {x}, [x]
    while pending:
        for user in pending.pop().users:
            if user not in found and not tells_no_values(user):
                found.add(user)
                pending.append(user)
    return found


def tells_no_values(node: fx.Node) -> bool:
    """Whether a node gives a size, a type or a place. Other attributes (x.mT, x.data) are values."""
    return node.target in WITHOUT_VALUES or (node.target is getattr and node.args[1] in ATTRIBUTES_WITHOUT_VALUES)


def role_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """What a node does to values: add, move, scale, a norm or an activation (of the shortcut), or other."""
    if node.op == "call_module":
        return _module_role(modules[str(node.target)])
    if node.target in ADDITIONS:
        return "add"
    if node.target in SCALINGS | DIVISIONS:
        return "scale"
    if node.target in MOVES or _is_timm_function(node.target):
        return "move"
    if node.target in ACTIVATIONS:
        return Shortcut.POST_ACTIVATION
    if node.target in (functional.layer_norm, functional.batch_norm, functional.group_norm):
        return Shortcut.POST_NORM
    return "other"


def _module_role(module: nn.Module) -> str:
    kind = type(module)
    if isinstance(module, nn.Identity):
        return "move"
    if isinstance(module, nn.Flatten | nn.Unflatten):
        return "move"
    if isinstance(module, nn.MultiheadAttention):
        return "other"
    if kind.__module__ == "torch.nn.modules.activation" or "activations" in kind.__module__:
        return Shortcut.POST_ACTIVATION
    if "norm" in kind.__module__.rsplit(".", 1)[-1]:
        return Shortcut.POST_NORM
    return "other"


def _is_timm_function(target: Any) -> bool:
    """Functions that timm keeps out of traces move elements: windows, grids, padding, position resampling."""
    return callable(target) and getattr(target, "__module__", "").startswith("timm.")


def concatenates(graphs: Iterable[fx.Node]) -> bool:
    """Whether features are concatenated anywhere among the nodes."""
    return any(node.target in (torch.cat, torch.concat) for node in graphs)
