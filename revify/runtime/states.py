"""What a module tree was when it first ran: parameters, buffers, children, modes, hooks and plain attributes.

A second run finds all of it again: the very tensors of the first run (whatever stands in their places by then), and the
value before the first run of those that it changed (running statistics, a codebook written through `.data`). What
the second run changes is gone afterwards: modules that the first run changed have another `__dict__` while it goes on, with
scratch copies, and the others are put back to what they were.

A copy is made of what a run may change before it runs, and kept if it did; by value, since writing through `.data` counts
nowhere, and observers count what changes nothing. That would be dear for large weights, so of those only what a module
is known to change is copied; everything is copied once, in a module's first run of all, which is how it becomes known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from revify.runtime.fingerprints import comparable
from revify.runtime.hooks import Hooks
from revify.runtime.predictors import PREFIX
from revify.runtime.replay import version
from revify.runtime.trees import Tree

SMALL = 4096  # elements, up to which a tensor is copied before every run
WRITES_ONLY = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)  # their statistics, while training

Place = tuple[int, str, object]  # of a tensor: which part of the tree, which attribute, where in it


@dataclass(slots=True)
class Habits:
    """What the runs of one module are known to change.

    Args:
        changed: where the tensors are that some run changed.
        known: whether there was a run yet that looked at everything.
        tree: the module tree as it was in the last run, None where that run changed it.
    """

    changed: set[Place] = field(default_factory=set)
    known: bool = False
    tree: Tree | None = None


@dataclass(slots=True)
class Watched:
    """A tensor of the tree.

    Args:
        tensor: itself.
        place: where it is.
        version: how often it was changed in place, before the run; afterwards, by its end.
        requires_grad: at the first run.
        before: its values before the run, where they are copied; afterwards, only where the run changed them.
        written: whether it is only written, so that its values before the run are of no use.
        lost: whether the run changed it, and its values before the run are not known.
    """

    tensor: Tensor
    place: Place
    version: int
    requires_grad: bool
    before: Tensor | None = None
    written: bool = False
    lost: bool = False

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return "parameter" if isinstance(self.tensor, nn.Parameter) else "buffer"


class State:
    """Of a module tree at its first run.

    Args:
        module: the root of the tree.
        habits: of the module; what this run changes is added to them.

    Attributes:
        hooks: of the modules.
    """

    def __init__(self, module: nn.Module, habits: Habits) -> None:
        self._habits = habits
        known = habits.tree
        self._tree = known if known is not None and known.root is module and known.same() else Tree(module)
        self.hooks = Hooks(self._tree.hooked)
        self._watched: dict[int, Watched] = {}
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        for index, part in enumerate(self._tree.parts):
            written = bool(part.found) and part.module.training and part.kind.forward in WRITES_ONLY
            for name, key, item in part.found:
                if isinstance(item, Tensor):
                    self._watch(item, (index, name, key), written=written and name == "_buffers")
                else:
                    self._generators.append((item, item.get_state()))

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the tree."""
        return (watched.tensor for watched in self._watched.values())

    def _watch(self, tensor: Tensor, place: Place, *, written: bool) -> None:
        if id(tensor) in self._watched:
            return
        watched = Watched(tensor, place, version(tensor), tensor.requires_grad, written=written)
        self._watched[id(tensor)] = watched
        named = place[2] if place[1] in ("_buffers", "_parameters") else place[1]
        if not comparable(tensor) or written or str(named).startswith(PREFIX):
            return
        small = tensor.numel() <= SMALL and (tensor.device.type == "cpu" or not isinstance(tensor, nn.Parameter))
        if place in self._habits.changed or small or not self._habits.known:
            watched.before = tensor.detach().clone()

    def after(self) -> None:
        """The run is over: keep the copies of what it changed, and forget the others."""
        with torch.no_grad():
            for watched in self._watched.values():
                now = version(watched.tensor)
                if watched.before is None:
                    if now != watched.version and not watched.written:
                        watched.lost = True
                        self._habits.changed.add(watched.place)
                elif now != watched.version or self._differs(watched):
                    self._habits.changed.add(watched.place)
                elif watched.place not in self._habits.changed:
                    watched.before = None
                watched.version = now
        self._generators = [(g, state) for g, state in self._generators if not torch.equal(state, g.get_state())]
        self._habits.known = True
        self._habits.tree = self._tree if self._tree.same() else None  # which holds nothing but what the modules hold

    def _differs(self, watched: Watched) -> bool:
        """Whether the run changed values without counting; on another device only the first run of all waits to know."""
        assert watched.before is not None  # as the caller asked
        waits = watched.tensor.device.type == "cpu" or not self._habits.known
        return waits and (
            watched.before.shape != watched.tensor.shape or not torch.equal(watched.before, watched.tensor)
        )

    def moved(self) -> list[Watched]:
        """What is not as it was at the run: changed in place since, or by the run itself without a copy of what it was."""
        known = (w for w in self._watched.values() if w.before is None and not w.written)
        return [w for w in known if w.lost or version(w.tensor) != w.version]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Let the body run the module as it was; on leaving, everything is as it was before."""
        with self._tree.again(self._scratch()) as attributes, self.hooks.left_out(attributes):
            yield

    def _scratch(self) -> dict[int, Any]:
        """What takes the place of tensors and generators, by their identity."""
        others: dict[int, Any] = {}
        for key, watched in self._watched.items():
            tensor = watched.tensor
            if watched.before is not None or watched.written:
                values = (tensor.detach() if watched.before is None else watched.before).clone()
            elif tensor.requires_grad != watched.requires_grad and tensor.is_leaf:
                values = tensor.detach()
            else:
                continue
            parameter = isinstance(tensor, nn.Parameter)
            others[key] = (
                nn.Parameter(values, watched.requires_grad)
                if parameter
                else values.requires_grad_(watched.requires_grad)
            )
        for generator, state in self._generators:
            others[id(generator)] = torch.Generator(generator.device)
            others[id(generator)].set_state(state)
        return others
