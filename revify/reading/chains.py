"""Values of one stream in a graph: each a residual addition, or its norm, after the one before.

v ─┬─ branch ─(+)─┬─ branch ─(+)─ norm ─┬─ …        a chain: v, the first sum, the norm of the second
   └───────────┘  └───────────┘
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from itertools import pairwise

from torch import fx, nn

from revify.reading.additions import ancestors, is_size
from revify.reading.roles import Role, Shortcut, dependent_on, find_shortcut, role_of

FEWEST = 3  # additions that make a run: a block with two of them is a block
ON_THE_WAY = (Shortcut.IDENTITY, Shortcut.SCALED)
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")


def find_chains(graph: fx.Graph, modules: dict[str, nn.Module], adding: Collection[str] = ()) -> list[list[fx.Node]]:
    """Values of a stream, each a residual addition, or what follows it, after the one before, in order.

    Args:
        graph: with child modules as leaves.
        modules: of the graph, by path.
        adding: the paths of child modules that add to their first argument themselves.
    """
    nodes = list(graph.nodes)
    order = {node: place for place, node in enumerate(nodes)}
    chains: list[list[fx.Node]] = []
    place = 0
    while place < len(nodes):
        chain = [nodes[place]]
        while following := _following(chain[-1], nodes[order[chain[-1]] + 1 :], modules, adding):
            chain.append(following)
        chain = _merged(chain)
        if len(chain) > FEWEST and not any(_changes(node, chain) for node in nodes):
            chains.append(chain)
            place = order[chain[-1]]
        else:
            place += 1
    return chains


def _following(
    v: fx.Node, later: list[fx.Node], modules: dict[str, nn.Module], adding: Collection[str]
) -> fx.Node | None:
    """The next value of the stream: the first sum to which a shortcut leads, with its norm or activation if it has one."""
    users = [user for user in v.users if not is_size(user)]
    if not users or v.op in ("get_attr", "output"):
        return None
    dependent = dependent_on(v)
    for node in later:
        if node.op == "call_module" and node.target in adding and node.args[:1] == (v,):
            return node if steps_between(v, node, dependent) is not None else None
        joins = role_of(node, modules) is Role.ADD and len(dependent.intersection(node.all_input_nodes)) > 1
        if joins and find_shortcut(v, node, modules) in ON_THE_WAY and steps_between(v, node, dependent) is not None:
            return _with_tail(node, modules)
    return None


def _with_tail(addition: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """The value that the next shortcut begins at: behind a norm or an activation that the sum goes to alone."""
    end = addition
    while len(end.users) == 1:
        (end,) = end.users
        if role_of(end, modules) not in (Role.ACTIVATE, Role.NORMALISE):
            return addition
    return end


def steps_between(v: fx.Node, end: fx.Node, dependent: set[fx.Node] | None = None) -> list[fx.Node] | None:
    """The operations of a step; None where something in between is used elsewhere."""
    inner = ((dependent or dependent_on(v)) & ancestors(end)) - {v}
    if any(user not in inner for node in inner if node is not end for user in node.users):
        return None
    return sorted(inner)


def _merged(chain: list[fx.Node]) -> list[fx.Node]:
    """A step that uses the value at which the step before it began (branches side by side) is one step with it."""
    place = 2
    while place < len(chain):
        before, v, end = chain[place - 2 : place + 1]
        inner = steps_between(v, end) or []
        if any(before in node.all_input_nodes for node in inner):
            if steps_between(before, end) is None:
                return chain[:place]
            del chain[place - 1]
            place = max(place - 1, 2)
        else:
            place += 1
    return chain


def _changes(node: fx.Node, chain: list[fx.Node]) -> bool:
    """Whether an operation changes in place what it did not make within its own step; `stream += branch` is a sum."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    operands = node.all_input_nodes
    in_place = node.op != "call_module" and ((name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE)
    if not in_place or not operands:
        return False
    if operands[0] in chain and node.target is operator.iadd:
        return False
    return not any(
        node in inner and operands[0] in inner for v, end in pairwise(chain) for inner in [steps_between(v, end) or []]
    )
