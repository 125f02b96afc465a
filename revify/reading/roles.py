"""What the operations of a graph do to values: add, move, scale, normalise, activate; and what lies on a shortcut."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from enum import Enum, StrEnum, auto
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
    NONE = "none"


class Role(Enum):
    """What an operation does to the values that it is given."""

    ADD = auto()
    SCALE = auto()
    MOVE = auto()  # the same values in another order, shape or type, or some of them
    NORMALISE = auto()
    ACTIVATE = auto()
    OTHER = auto()


ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
SUBTRACTIONS = frozenset({operator.sub, operator.isub, torch.sub, "sub", "sub_"})
FROM_THE_FIRST = frozenset(
    {torch.addcmul, torch.lerp, "addcmul", "lerp", "addcmul_", "lerp_"}
)  # to their first argument
DROPOUTS = frozenset({functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d})
SCALINGS = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})
DIVISIONS = frozenset({operator.truediv, operator.itruediv, torch.div, "truediv", "div", "div_"})
MOVES = frozenset(
    (
        *(operator.getitem, "getitem", "select_result", functional.pad),
        *(torch.reshape, torch.flatten, "view", "reshape", "flatten", "unflatten", "contiguous"),
        *(torch.permute, torch.transpose, torch.movedim, torch.swapaxes, "permute", "transpose", "movedim", "swapaxes"),
        *(torch.squeeze, torch.unsqueeze, torch.roll, torch.narrow, "squeeze", "unsqueeze", "roll", "narrow"),
        *(torch.cat, torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"),
        *("to", "float", "type_as", "clone"),
    )
)
ACTIVATIONS = frozenset(
    (
        *(functional.relu, functional.relu_, functional.gelu, functional.silu, functional.leaky_relu),
        *(functional.hardswish, torch.relu, torch.relu_, torch.sigmoid, torch.tanh),
        *("relu", "relu_", "sigmoid", "tanh"),
    )
)
NORMS = frozenset({functional.layer_norm, functional.batch_norm, functional.group_norm})
ROLES: dict[Any, Role] = {  # by the target of a node: a function, or the name of a method of tensors
    **dict.fromkeys(ADDITIONS, Role.ADD),
    **dict.fromkeys(SCALINGS | DIVISIONS, Role.SCALE),
    **dict.fromkeys(MOVES, Role.MOVE),
    **dict.fromkeys(NORMS, Role.NORMALISE),
    **dict.fromkeys(ACTIVATIONS | DROPOUTS, Role.ACTIVATE),
    **dict.fromkeys(SUBTRACTIONS | FROM_THE_FIRST, Role.ADD),
}
BEFORE_AN_ADDITION = {Role.ACTIVATE: Shortcut.POST_ACTIVATION, Role.NORMALISE: Shortcut.POST_NORM}
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
        if role is Role.ADD and node.target in FROM_THE_FIRST:
            paths += [(n, True, max(found, Shortcut.SCALED, key=_weight)) for n in operands if n is node.args[0]]
        elif role is Role.ADD:
            paths += [(n, True, found) for n in operands]
        elif role is Role.MOVE:
            paths += [(n, added, found) for n in operands]
        elif role is Role.SCALE and len(operands) == 1 and (node.target in SCALINGS or operands[0] is node.args[0]):
            paths.append((operands[0], added, max(found, Shortcut.SCALED, key=_weight)))
        elif role in BEFORE_AN_ADDITION:
            paths += [(n, False, max(found, BEFORE_AN_ADDITION[role], key=_weight)) for n in operands[:1]]
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


def role_of(node: fx.Node, modules: dict[str, nn.Module]) -> Role:
    """What a node does to values."""
    if node.op == "call_module":
        return _module_role(modules[str(node.target)])
    if node.target in ROLES:
        return ROLES[node.target]
    return Role.MOVE if _is_timm_function(node.target) else Role.OTHER


def _module_role(module: nn.Module) -> Role:
    """What a layer does, guessed from where its class is defined.

    A wrong guess is harmless: blocks are proven by running them, so it costs a refusal, or is seen there.
    """
    home = type(module).__module__
    if isinstance(module, nn.Identity | nn.Flatten | nn.Unflatten):
        return Role.MOVE
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return Role.ACTIVATE
    if isinstance(module, nn.MultiheadAttention):  # torch defines it among the activations
        return Role.OTHER
    if home == "torch.nn.modules.activation" or "activations" in home:
        return Role.ACTIVATE
    return Role.NORMALISE if "norm" in home.rsplit(".", 1)[-1] else Role.OTHER


def _is_timm_function(target: Any) -> bool:
    """Functions that timm keeps out of traces move elements: windows, grids, padding, position resampling."""
    return callable(target) and getattr(target, "__module__", "").startswith("timm.")


def concatenates(graphs: Iterable[fx.Node]) -> bool:
    """Whether features are concatenated anywhere among the nodes."""
    return any(node.target in (torch.cat, torch.concat) for node in graphs)
