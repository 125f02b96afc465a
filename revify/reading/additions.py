"""The residual additions on the way through a block, in a graph of its operations.

    start ─┬─ norm ─ conv ─ … ─ f ─(+)─ act ─ end
           └─────────────────────────┘            a joint: end = tail(shortcut(start) + f)

A graph may be that of one block, with its children as leaves, or that of the whole model.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

from revify.reading.roles import ADDITIONS, Role, Shortcut, dependent_on, find_shortcut, role_of, tells_no_values
from revify.reading.tracing import Trace


@dataclass(frozen=True, slots=True)
class Joint:
    """One residual addition.

    Args:
        start: the value of the stream that goes in.
        addition: the node that adds.
        branch: f, what is added to the shortcut.
        end: the value of the stream that comes out.
        tail: the nodes from the addition to the end, in order, without the addition.
        activated: whether there are activations in the tail; it only moves elements otherwise.
    """

    start: fx.Node
    addition: fx.Node
    branch: fx.Node
    end: fx.Node
    tail: tuple[fx.Node, ...]
    activated: bool


def find_joints(x: fx.Node, y: fx.Node, modules: dict[str, nn.Module]) -> tuple[Joint, ...]:
    """The residual additions from x to y in order; none where y is not a chain of them.

    Args:
        x: the stream that goes into a block.
        y: what comes out of it.
        modules: of the graph, by path.
    """
    between = nodes_between(x, y)
    additions = [n for n in between if n.target in ADDITIONS]
    found: list[Joint] = []
    start = x
    for addition in additions:
        if not _narrow(x, y, addition) or find_shortcut(start, addition, modules) not in (
            Shortcut.IDENTITY,
            Shortcut.SCALED,
        ):
            continue
        operands = [n for n in addition.args[:2] if isinstance(n, fx.Node)]
        shortcuts = [n for n in operands if _is_shortcut(start, n, modules)]
        branches = [n for n in operands if n not in shortcuts]
        if len(shortcuts) != 1 or len(branches) != 1 or start not in ancestors(branches[0]):
            continue
        found.append(Joint(start, addition, branches[0], addition, (), activated=False))
        start = addition
    if not found:
        return ()
    ends = [*(joint.start for joint in found[1:]), y]
    joints = []
    for joint, end in zip(found, ends, strict=True):
        tail = tuple(n for n in nodes_between(joint.addition, end) if n is not joint.addition)
        roles = {role_of(n, modules) for n in tail}
        if not roles <= {Role.MOVE, Role.SCALE, Role.ACTIVATE} or any(_has_values(n, modules) for n in tail):
            return ()
        joints.append(Joint(joint.start, joint.addition, joint.branch, end, tail, Role.ACTIVATE in roles))
    return tuple(joints)


def count_additions(trace: Trace) -> Counter[str]:
    """How many additions each module does itself, by its path."""
    found = Counter[str]()
    for node in trace.graph.nodes if trace.graph is not None else ():
        if node.op != "placeholder" and role_of(node, trace.modules) is Role.ADD and len(node.all_input_nodes) > 1:
            found[next(reversed(node.meta.get("nn_module_stack") or {"": None}))] += 1
    return found


def find_ends(graph: fx.Graph, x: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """x, the additions that part the segments, y; or nothing where there is only one segment."""
    y = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(y, fx.Node) or has_side_effects(graph):
        return []
    found, dependent = [x], dependent_on(x)
    for node in graph.nodes:
        joins = node.target in ADDITIONS and len(dependent.intersection(node.all_input_nodes)) > 1
        narrow = joins and node is not y and _narrow(x, y, node)
        if narrow and find_shortcut(found[-1], node, modules) in (Shortcut.IDENTITY, Shortcut.SCALED):
            found.append(node)
    while len(found) > 1 and find_shortcut(found[-1], y, modules) is None:
        found.pop()  # no addition comes after it: what does belongs to its own segment
    return [*found, y] if len(found) > 1 else []


def has_side_effects(graph: fx.Graph) -> bool:
    """Whether nodes that nobody uses are more than sizes and torch.fx's own asserts of fixed arguments."""
    unused = [n for n in graph.nodes if not n.users and n.op not in ("output", "placeholder", "get_attr")]
    return not all(is_size(n) or "assert" in str(n.target) for n in unused)


def nodes_between(x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """The nodes through which values lead from x to y, both included, in order."""
    both = ancestors(y) & dependent_on(x)
    return [node for node in _in_order(x, y) if node in both]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, pending = {node}, [node]
    while pending:
        for used in pending.pop().all_input_nodes:
            if used not in found:
                found.add(used)
                pending.append(used)
    return found


def is_size(node: fx.Node) -> bool:
    """Whether it gives a shape, a type, a device, or a part of one."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_size(node.args[0])
    return tells_no_values(node)


def _in_order(x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """The graph's nodes from x to y."""
    nodes, node = [x], x
    while node is not y and node.op != "output":
        node = node.next
        nodes.append(node)
    return nodes


def _narrow(x: fx.Node, y: fx.Node, node: fx.Node) -> bool:
    """Whether all values (not sizes) that lead from x to y go through a node."""
    seen, pending = {node}, [x]
    while pending:
        place = pending.pop()
        if place is y:
            return node is y
        if place not in seen:
            seen.add(place)
            pending += [user for user in place.users if not is_size(user)]
    return True


def _is_shortcut(start: fx.Node, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a value is the start itself, moved or scaled by something that does not depend on it."""
    while node is not start:
        operands = [n for n in node.all_input_nodes if start in ancestors(n)]
        if role_of(node, modules) not in (Role.MOVE, Role.SCALE) or len(operands) != 1:
            return False
        node = operands[0]
    return True


def _has_values(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an operation has parameters of its own."""
    if node.op == "call_module":
        return any(True for _ in modules[str(node.target)].parameters())
    return any(n.op == "get_attr" for n in node.all_input_nodes)
