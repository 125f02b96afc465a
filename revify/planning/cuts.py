"""A branch in the graph of a model → which of its layers are cut, so that it maps one half of the channels to the other.

    half of x ─ norm ─ qkv ══ attention ══ proj ─ LayerScale ─ half of f        ─ half the width   ═ as wide as before

From both ends, halved values spread through what treats channels alike or one by one (norms, depthwise convolutions,
LayerScale, activations, pooling: those with parameters are cut, too) up to layers that mix channels (Linear, Conv),
which are cut on one side. Where a halved value meets anything else, the branch is not cut.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from revify.reading.additions import Joint, is_size, nodes_between
from revify.reading.roles import ACTIVATIONS, ADDITIONS, MOVES, SCALINGS, Role, role_of
from revify.stage_plans import Cut, Side

ELEMENTWISE: set[Any] = {"mean", "sub", "div", "div_", "neg"}
ELEMENTWISE |= {functional.dropout, functional.avg_pool2d, functional.max_pool2d, functional.adaptive_avg_pool2d}
ELEMENTWISE |= {operator.truediv, operator.neg, operator.sub, torch.mean, torch.sub, torch.div}
PLAIN = ADDITIONS | SCALINGS | MOVES | ACTIVATIONS | ELEMENTWISE


class NotCut(Exception):
    """Why a branch is not cut."""


@dataclass(slots=True)
class Spread:
    """Halved values on their way through one branch.

    Args:
        joint: the branch.
        block: path of the block.
        modules: of the graph, by path.
        channels: of the stream.
        nodes: of the branch.
        halves: the halved values and which half they hold.
        cuts: what is cut so far.
    """

    joint: Joint
    block: str
    modules: dict[str, nn.Module]
    channels: int
    nodes: set[fx.Node]
    halves: dict[fx.Node, int] = field(default_factory=dict)
    cuts: dict[tuple[str, Side], Cut] = field(default_factory=dict)

    def mark(self, node: fx.Node, half: int) -> None:
        """A value is halved: what made it and what uses it must be, too."""
        if self.halves.setdefault(node, half) != half:
            raise NotCut(f"{node.name} would hold both halves")

    def run(self, takes: int, gives: int) -> tuple[Cut, ...]:
        """Spread from both ends until nothing new is halved."""
        self.mark(self.joint.start, takes)
        self.mark(self.joint.branch, gives)
        done: set[fx.Node] = set()
        while waiting := [node for node in self.halves if node not in done]:
            node = waiting[0]
            done.add(node)
            if node is not self.joint.start:
                self._made(node, self.halves[node])
            for user in node.users:
                if user in self.nodes and not is_size(user):
                    self._used(user, self.halves[node])
        return tuple(self.cuts.values())

    def _made(self, node: fx.Node, half: int) -> None:
        """How a halved value comes about."""
        layer = self._layer(node)
        if layer is not None and _mixes(layer):
            if _width(layer, "out") != self.channels:
                raise NotCut(f"{node.target} gives {_width(layer, 'out')} channels")
            self._cut(str(node.target), Side.OUTPUT, half)
            return
        for source in self._through(node, half):
            self.mark(source, half)

    def _used(self, node: fx.Node, half: int) -> None:
        """What becomes of a halved value."""
        layer = self._layer(node)
        if layer is not None and _mixes(layer):
            if _width(layer, "in") != self.channels:
                raise NotCut(f"{node.target} takes {_width(layer, 'in')} channels")
            self._cut(str(node.target), Side.INPUT, half)
            return
        self._through(node, half)
        self.mark(node, half)

    def _through(self, node: fx.Node, half: int) -> list[fx.Node]:
        """The values of an operation that are halved as its result is; what it holds itself is cut."""
        layer, owner = self._layer(node), self._owner(node)
        if owner is not None and _by_channel(self.modules[owner], self.channels):
            self._cut(owner, Side.CHANNELS, half)
            return [source for source in node.all_input_nodes if source in self.nodes and not is_size(source)]
        if layer is not None:
            if any(True for _ in layer.parameters()):
                if not _by_channel(layer, self.channels):
                    raise NotCut(f"{node.target} ({type(layer).__name__}) cannot be cut")
                self._cut(str(node.target), Side.CHANNELS, half)
            elif role_of(node, self.modules) is Role.OTHER and not _is_plain(layer):
                raise NotCut(f"{node.target} ({type(layer).__name__}) is not known to treat channels alike")
        elif node.target not in PLAIN and not getattr(node.target, "__module__", "").startswith("timm."):
            raise NotCut(f"{node.target} is not known to treat channels alike")
        sources = []
        for source in node.all_input_nodes:
            parameter = self._parameter(source)
            if parameter is not None:
                if self.channels in parameter.shape:
                    self._cut(self._root(source)[1], Side.VALUE, half)
            elif source in self.nodes:
                sources.append(source)
        return sources

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _owner(self, node: fx.Node) -> str | None:
        """The childless module with parameters whose own code the node is: a norm of timm, a LayerScale."""
        path = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
        module = self.modules.get(path)
        inside = path.startswith(self.block + ".") and module is not None and not list(module.children())
        return path if inside and module is not None and any(True for _ in module.parameters()) else None

    def _root(self, node: fx.Node) -> tuple[fx.Node, str]:
        """A parameter's node, through what only moves its elements, and its path."""
        while node.op != "get_attr" and node.target in MOVES and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node, str(node.target)

    def _parameter(self, node: fx.Node) -> Tensor | None:
        root, path = self._root(node)
        if root.op != "get_attr":
            return None
        owner, _, name = path.rpartition(".")
        value = getattr(self.modules[owner], name)
        return value if isinstance(value, Tensor) else None

    def _cut(self, path: str, side: Side, half: int) -> None:
        if not path.startswith(self.block + "."):
            raise NotCut(f"{path} lies outside of {self.block}")
        cut = Cut(path.removeprefix(self.block + "."), side, half)
        if self.cuts.setdefault((path, side), cut) != cut:
            raise NotCut(f"{path} would be cut to both halves")


def find_cuts(
    joint: Joint, block: str, modules: dict[str, nn.Module], channels: int, takes: int, gives: int
) -> tuple[Cut, ...] | None:
    """What of a branch is cut, or None where it cannot be.

    Args:
        joint: the branch, in the graph of the whole model.
        block: path of its block.
        modules: of the graph, by path.
        channels: of the stream.
        takes: which half of them the branch is given.
        gives: which half it gives.
    """
    nodes = set(nodes_between(joint.start, joint.branch)) - {joint.start}
    for ends in ((takes, gives), (takes, takes)):  # where nothing in it mixes channels, both ends are cut alike
        try:
            return Spread(joint, block, modules, channels, nodes).run(*ends)
        except NotCut:
            if channels % 2:
                return None
    return None


def _mixes(layer: nn.Module) -> bool:
    """Whether a layer mixes channels."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == 1
    return isinstance(layer, nn.Linear)


def _width(layer: nn.Module, side: str) -> int:
    width: int = getattr(layer, f"{side}_features", 0) or getattr(layer, f"{side}_channels", 0)
    return width


def _by_channel(layer: nn.Module, channels: int) -> bool:
    """Whether a layer with parameters treats channels one by one, or normalises over them."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == layer.in_channels == layer.out_channels == channels
    if isinstance(layer, nn.GroupNorm) and layer.num_groups > 1:
        return False
    held = [*layer.parameters(), *(b for b in layer.buffers() if b.dim())]
    named = type(layer).__module__.rpartition(".")[2]
    known = isinstance(layer, nn.PReLU) or any(
        word in named + type(layer).__name__.lower() for word in ("norm", "scale")
    )
    return known and all(
        value.dim() >= 1 and value.shape[0] == channels and value.numel() == channels for value in held
    )


def _is_plain(layer: nn.Module) -> bool:
    """Layers without parameters that treat channels alike, besides those that are moves and activations."""
    kind = type(layer)
    return (
        kind.__module__.startswith(("torch.nn.modules.pooling", "torch.nn.modules.dropout"))
        or kind.__name__.startswith("Drop")
        or (not list(layer.children()) and kind.__module__.startswith("timm.layers"))
    )
