"""The modules of a tree as they are at one time: their attributes, and what the plain containers among them hold.

A tree is compared with what has become of it by identity, and as a whole, since this is done several times for each block
and step: nothing is copied as long as nothing changes.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from revify.runtime.hooks import AFTER, BEFORE
from revify.runtime.replay import without_graph

CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, set, deque))
KEPT = (Tensor, torch.Generator)
MANY = 256  # entries, beyond which a plain container is left as it is
END = object()


class Container:
    """A plain container and what it holds.

    Args:
        name: of the attribute.
        container: itself.
        graphs: leaves that stand for tensors with a graph, by their identity; others are added.
    """

    __slots__ = ("container", "items", "keys", "name")

    def __init__(self, name: str, container: Any, graphs: dict[int, Tensor]) -> None:  # Any: all kinds in CONTAINERS
        self.name, self.container = name, container
        self.keys = tuple(container) if isinstance(container, dict) else None
        self.items = tuple(_leaf(item, graphs) for item in self.live)

    @property
    def live(self) -> Iterable[Any]:
        """What it holds now, whenever that is asked."""
        return self.container.values() if isinstance(self.container, dict) else self.container

    def same(self) -> bool:
        """Whether it holds what it held."""
        return (self.keys is None or tuple(self.container) == self.keys) and _identical(self.live, self.items)

    def copy(self, others: Mapping[int, Any]) -> Any:
        """Another one with what it held, but for others in the places of some of it, by their identity."""
        return self._filled(self.container.copy(), [others.get(id(item), item) for item in self.items])

    def put_back(self) -> None:
        """Let it hold again what it held."""
        self._filled(self.container, self.items)

    def _filled(self, container: Any, items: Iterable[Any]) -> Any:
        container.clear()
        if self.keys is not None:
            container.update(zip(self.keys, items, strict=True))
        elif isinstance(container, set):
            container.update(items)
        else:
            container.extend(items)
        return container


class Part:
    """One module of a tree.

    Args:
        module: itself.
        graphs: leaves that stand for tensors with a graph, by their identity; others are added.

    Attributes:
        found: the tensors and generators among its attributes: in which one, where in it, itself.
        hooked: whether it has forward hooks.
    """

    __slots__ = ("attributes", "containers", "found", "hooked", "ids", "kind", "module", "names", "values")

    def __init__(self, module: nn.Module, graphs: dict[int, Tensor]) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = vars(module)
        self.names = tuple(self.attributes)
        self.values = tuple(_leaf(value, graphs) for value in self.attributes.values())
        self.containers = tuple(
            Container(name, value, graphs)
            for name, value in self.attributes.items()
            if type(value) in CONTAINERS and len(value) <= MANY
        )
        self.found: list[tuple[str, object, Any]] = [
            (name, None, value) for name, value in zip(self.names, self.values, strict=True) if isinstance(value, KEPT)
        ]
        for held in self.containers:
            if held.name != "_modules" and type(held.container) is not set:
                keys = range(len(held.items)) if held.keys is None else held.keys
                self.found += [
                    (held.name, key, item) for key, item in zip(keys, held.items, strict=True) if isinstance(item, KEPT)
                ]
        self.hooked = bool(self.attributes[BEFORE] or self.attributes[AFTER])
        self.ids = frozenset(id(item) for _, _, item in self.found)

    def same(self) -> bool:
        """Whether the module is as it was."""
        return (
            vars(self.module) is self.attributes
            and type(self.module) is self.kind
            and tuple(self.attributes) == self.names
            and _identical(self.attributes.values(), self.values)
            and all(held.same() for held in self.containers)
        )

    def then(self, others: Mapping[int, Any]) -> dict[str, Any]:
        """The attributes that it had, with containers of their own and others in the places of some tensors."""
        own = {name: others.get(id(value), value) for name, value in zip(self.names, self.values, strict=True)}
        return own | {held.name: held.copy(others) for held in self.containers}

    def put_back(self) -> None:
        """Let the module be again as it was."""
        self.attributes.clear()
        self.attributes.update(zip(self.names, self.values, strict=True))
        give(self.module, self.attributes)
        for held in self.containers:
            if not held.same():
                held.put_back()


class Tree:
    """A module with all modules in it, as they are now. What has a graph is held as a leaf, without it.

    Args:
        root: the module.

    Attributes:
        parts: its modules.
        hooked: those of them that have forward hooks.
    """

    def __init__(self, root: nn.Module) -> None:
        graphs: dict[int, Tensor] = {}
        self.root = root
        self.parts = tuple(Part(module, graphs) for module in root.modules())
        self.hooked = tuple(part.module for part in self.parts if part.hooked)
        self._modules = tuple(part.module for part in self.parts)
        self._kinds = (*(part.kind for part in self.parts), END)
        self._attributes = (*(part.attributes for part in self.parts), END)
        held = [held for part in self.parts for held in part.containers]
        full = [each for each in held if each.items]
        self._empty = tuple(each.container for each in held if not each.items)
        mappings = [part.attributes for part in self.parts] + [each.container for each in full if each.keys is not None]
        self._keyed = tuple(mappings)
        self._keys = (*chain.from_iterable(mappings), END)
        self._live = (*(part.attributes.values() for part in self.parts), *(each.live for each in full))
        self._items = (
            *chain.from_iterable(part.values for part in self.parts),
            *chain.from_iterable(each.items for each in full),
            END,
        )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the module has a tree of its own

    def same(self) -> bool:
        """Whether nothing in it has become another thing."""
        return (
            all(map(is_, chain(map(vars, self._modules), (END,)), self._attributes))
            and all(map(is_, chain(map(type, self._modules), (END,)), self._kinds))
            and not any(self._empty)
            and all(map(is_, chain(chain.from_iterable(self._live), (END,)), self._items))
            and all(map(is_, chain(chain.from_iterable(self._keyed), (END,)), self._keys))
        )

    @contextmanager
    def again(self, others: Mapping[int, Any]) -> Iterator[list[dict[str, Any]]]:
        """Let the body run the modules as they were; on leaving, all is as it was before.

        Args:
            others: what takes the place of tensors and generators meanwhile, by their identity.

        Yields:
            The attributes of those that are not themselves meanwhile; modules with hooks are among them.
        """
        same = self.same()
        apart = [p for p in self.parts if p.hooked or not p.ids.isdisjoint(others) or not (same or p.same())]
        now = [vars(part.module) for part in apart]
        then = [part.then(others) for part in apart]
        try:
            for part, attributes in zip(apart, then, strict=True):
                give(part.module, attributes)
            yield then
        finally:
            for part, attributes in zip(apart, now, strict=True):
                give(part.module, attributes)
            if not (same and self.same()):
                for part in self.parts:
                    if part not in apart and not part.same():
                        part.put_back()


def give(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Let the module have these attributes and no others."""
    object.__setattr__(module, "__dict__", attributes)


def _identical(live: Iterable[Any], items: tuple[Any, ...]) -> bool:
    return all(map(is_, chain(live, (END,)), (*items, END)))


def _leaf(value: Any, graphs: dict[int, Tensor]) -> Any:
    """The value; of a tensor with a graph a leaf of its own, always the same."""
    if isinstance(value, Tensor) and not value.is_leaf:
        return graphs.setdefault(id(value), without_graph(value))
    return value
