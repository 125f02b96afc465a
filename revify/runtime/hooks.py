"""Hooks on the modules of a tree: in a second run only those that it needs.

    first run:   hook ──▶ its result, and whether it changed something that later code may use
    second run:  those that did fire again; those that only looked on (and noted what they saw) do not

A hook changes something if it returns a value, changes a tensor that it is given in place or asks for its gradient, or changes
a parameter or buffer of its module. A hook before the forward also does if it sets an attribute of its module, as
`weight_norm` does; one that sits behind the forward may keep there what it saw.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as for_all
from torch.utils import _pytree as pytree

from revify.runtime.replay import address, version

BEFORE, AFTER = "_forward_pre_hooks", "_forward_hooks"
GLOBAL = ("_global_forward_pre_hooks", "_global_forward_hooks")  # for the modules of all models


@dataclass(frozen=True, slots=True)
class Seen:
    """Stands in for a hook during a first run.

    Args:
        hook: itself.
        number: which torch gave it; no other hook has it.
        before: whether it is one that fires before the forward.
        changing: the numbers of the hooks that changed something.
    """

    hook: Callable[..., Any]  # Any: hooks return what they like
    number: int
    before: bool
    changing: set[int]

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Fire the hook, and look at what it did."""
        if self.number in self.changing:
            return self.hook(module, *given)
        then = _look(module, given, attributes=self.before)
        result = self.hook(module, *given)
        if result is not None or _look(module, given, attributes=self.before) != then:
            self.changing.add(self.number)
        return result


class Hooks:
    """Of the modules of a tree, and those for all modules.

    Args:
        parts: the modules.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        everywhere: list[dict[int, Any]] = [vars(for_all)[name] for name in GLOBAL]
        self._shared = [place for place in everywhere if place]
        own = [(name, vars(part)[name]) for part in parts for name in (BEFORE, AFTER)]
        self._places = [(name, place) for name, place in own if place]
        self._places += [(name, place) for name, place in zip((BEFORE, AFTER), everywhere, strict=True) if place]
        self._changing: set[int] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let the body be the first run: note what hooks change."""
        for name, place in self._places:
            for number, hook in list(place.items()):
                place[number] = Seen(hook, number, name == BEFORE, self._changing)
        try:
            yield
        finally:
            for _, place in self._places:
                for number, hook in list(place.items()):
                    if isinstance(hook, Seen) and hook.changing is self._changing:
                        place[number] = hook.hook

    @contextmanager
    def left_out(self, attributes: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Let the body be a second run, in which the hooks that only looked on do not fire.

        Args:
            attributes: what the modules have in it, to be changed in place.
        """
        if not self._places:
            yield
            return
        for own in attributes:
            for name in (BEFORE, AFTER):
                own[name] = OrderedDict((n, hook) for n, hook in own[name].items() if n in self._changing)
        whole = [(place, dict(place)) for place in self._shared]
        for place, hooks in whole:
            _fill(place, {number: hook for number, hook in hooks.items() if number in self._changing})
        try:
            yield
        finally:
            for place, hooks in whole:
                _fill(place, hooks)


def _fill(place: dict[int, Any], hooks: dict[int, Any]) -> None:
    place.clear()
    place.update(hooks)


def _look(module: nn.Module, given: Any, *, attributes: bool) -> list[object]:
    """What a hook may change, to be compared; it holds what it names by identity, so that no other object can take it."""
    leaves = pytree.tree_leaves(given)
    own = vars(module)
    held = [*own["_parameters"].values(), *own["_buffers"].values()]
    facts = [_Same(leaf) for leaf in (*leaves, *held)]
    return [*facts, *((name, _Same(value)) for name, value in own.items() if attributes)]


class _Same:
    """An object that equals itself alone, and a tensor only as it was."""

    __slots__ = ("state", "value")

    def __init__(self, value: object) -> None:
        self.value = value
        self.state = (version(value), value.requires_grad, address(value)) if isinstance(value, Tensor) else ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value and self.state == other.state

    __hash__ = None  # type: ignore[assignment]  # compared only
