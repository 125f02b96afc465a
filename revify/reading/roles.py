"""What the operations of a graph do to values: add, move, scale, normalise, activate; and what lies on a shortcut."""

from __future__ import annotations

import operator
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
SUBTRACTIONS = frozenset({operator.sub, operator.isub, torch.sub, torch.rsub, "sub", "sub_", "rsub"})
FROM_THE_FIRST = frozenset(  # to their first argument
    (
        *(torch.addcmul, torch.addcdiv, torch.lerp, torch.addmm, torch.baddbmm),
        *("addcmul", "addcdiv", "lerp", "addmm", "baddbmm", "addcmul_", "addcdiv_", "lerp_"),
    )
)
SUMS = frozenset({torch.sum, torch.mean, "sum", "mean"})  # of what was stacked
DROPOUTS = frozenset(
    (
        *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, torch.dropout),
        *(functional.alpha_dropout, functional.feature_alpha_dropout, "masked_fill", torch.masked_fill),
    )
)
SCALINGS = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})
DIVISIONS = frozenset({operator.truediv, operator.itruediv, torch.div, "truediv", "div", "div_"})
MOVES = frozenset(
    (
        *(operator.getitem, "getitem", "select_result", functional.pad),
        *(torch.reshape, torch.flatten, "view", "reshape", "flatten", "unflatten", "contiguous"),
        *(torch.permute, torch.transpose, torch.movedim, torch.swapaxes, "permute", "transpose", "movedim", "swapaxes"),
        *(torch.squeeze, torch.unsqueeze, torch.roll, torch.narrow, "squeeze", "unsqueeze", "roll", "narrow"),
        *(
            torch.cat,
            torch.concat,
            torch.concatenate,
            torch.chunk,
            torch.split,
            torch.unbind,
            "chunk",
            "split",
            "unbind",
        ),
        *(torch.stack, torch.as_tensor, torch.clone, torch.where, "where"),
        *("to", "float", "half", "bfloat16", "double", "type", "type_as", "clone"),
    )
)
ACTIVATIONS = frozenset(
    (
        *(functional.relu, functional.relu_, functional.gelu, functional.silu, functional.leaky_relu),
        *(
            functional.hardswish,
            functional.hardtanh,
            functional.relu6,
            functional.elu,
            functional.selu,
            functional.mish,
        ),
        *(functional.softplus, functional.softsign, functional.prelu, functional.hardsigmoid, functional.tanh),
        *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.nan_to_num),
        *("relu", "relu_", "sigmoid", "tanh", "clamp", "clamp_", "nan_to_num"),
    )
)
NORMS = frozenset(
    (
        *(functional.layer_norm, functional.batch_norm, functional.group_norm, functional.instance_norm),
        *(functional.rms_norm, functional.normalize),
    )
)
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
        elif role is Role.SCALE:
            gated = Shortcut.SCALED if len(operands) == 1 else Shortcut.POST_ACTIVATION  # by what follows from x, too
            scaled = operands if node.target in SCALINGS else [n for n in operands if n is node.args[0]]
            paths += [(n, added, max(found, gated, key=_weight)) for n in scaled]
        elif role in BEFORE_AN_ADDITION:
            paths += [(n, False, max(found, BEFORE_AN_ADDITION[role], key=_weight)) for n in operands[:1]]
    return None


def follows(x: fx.Node, y: fx.Node, modules: dict[str, nn.Module], *, added: bool) -> bool:
    """Whether y is x after sums, moves, scales, norms and activations only.

    Args:
        x: a value.
        y: a later one.
        modules: of the graph, by path.
        added: whether something must have been added on the way, and the norms and activations come behind that.
    """
    seen: set[tuple[fx.Node, bool]] = set()
    pending = [(y, not added)]
    while pending:
        node, found = pending.pop()
        if node is x:
            if found:
                return True
        elif (node, found) not in seen:
            seen.add((node, found))
            role, operands = role_of(node, modules), node.all_input_nodes
            if role in (Role.ADD, Role.MOVE, Role.SCALE):
                pending += [(n, found or role is Role.ADD) for n in operands]
            elif role in BEFORE_AN_ADDITION:
                pending += [(n, found and not added) for n in operands[:1]]
    return False


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
        return role_of_module(modules[str(node.target)])
    if node.target in SUMS and node.args and getattr(node.args[0], "target", None) is torch.stack:
        return Role.ADD
    if node.target in ROLES:
        return ROLES[node.target]
    return Role.MOVE if _is_timm_function(node.target) else Role.OTHER


def role_of_module(module: nn.Module) -> Role:
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


def concatenates(x: Any, y: Any, modules: dict[str, nn.Module]) -> bool:
    """Whether y is a concatenation of node x itself and something else."""
    seen: set[tuple[fx.Node, bool]] = set()
    paths = [(y, False)] if isinstance(y, fx.Node) else []
    while paths:
        node, joined = paths.pop()
        if node is x and joined:
            return True
        if (node, joined) in seen or node is x:
            continue
        seen.add((node, joined))
        role, operands = role_of(node, modules), node.all_input_nodes
        if role in (Role.MOVE, *BEFORE_AN_ADDITION):
            joins = node.target in (torch.cat, torch.concat, torch.concatenate) and len(operands) > 1
            paths += [(n, joined or joins) for n in (operands if role is Role.MOVE else operands[:1])]
    return False
