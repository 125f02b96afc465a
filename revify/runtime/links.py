"""How a block of a stage finds the forward pass that it belongs to: a `Link` rides on the value that it is given.

So the state belongs to the forward pass, never to a module, and a value that something was done to carries no link.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from revify.errors import StreamError
from revify.runtime.replay import version


class Rule(Protocol):
    """What the blocks of one stage share; known by its identity."""

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks' paths, or those of their steps, in order."""


class Recorded(Protocol):
    """What is recorded of one forward pass through a stage."""

    @property
    def rule(self) -> Rule:
        """Of the stage."""


class Rider:
    """Rides on a value within one forward pass. Of a value that is saved or copied, nothing (an empty set) comes along."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[set[Any]], tuple[()]]:
        return set, ()  # None has no name that torch.load(weights_only=True) knows


class Link(Rider):
    """Rides on a stream value on its way from one block to the next.

    Args:
        tape: of this forward pass.
        index: k+1, the block that comes next.
        older: z[k-1], with its graph, where the next block needs it; None where a stream begins at the next block.
        newest: z[k], with its graph, where the value that carries the link is a shorter-typed copy of it; else None.
    """

    __slots__ = ("index", "newest", "older", "tape", "version")

    def __init__(self, tape: Recorded, index: int, older: Tensor | None, newest: Tensor | None, version: int) -> None:
        self.tape, self.index, self.older, self.newest, self.version = tape, index, older, newest, version


def take_link(x: Tensor, rule: Rule, index: int) -> Link | None:
    """The link that rides on the input of block `index`; None for the first block of a stage.

    Raises:
        StreamError: the input is not what the block before it returned.
    """
    owner = carrier(x, "revify_link")
    link: Link | None = owner.__dict__.get("revify_link") or None
    if link is not None and index == 0 and link.tape.rule is not rule:
        return None  # a fork: the value goes to its own next block as well, which takes the link
    leave_link(x)
    name = rule.names[index]
    if link is not None and (link.tape.rule is not rule or link.index != index):
        came_from = link.tape.rule.names[link.index - 1]
        raise StreamError(
            f"{name} was given the output of {came_from}, which should go to {link.tape.rule.names[link.index]}: "
            "the blocks of a stage must be called in the order in which they were converted. Call them in order, or "
            "convert again after reordering the plain model."
        )
    if index == 0:
        return None
    previous = rule.names[index - 1]
    if link is None:
        raise StreamError(
            f"{name}: its input is not the output of {previous}. Something stands between the two blocks (an "
            "operation, a hook that returns a new tensor, gradient checkpointing), or blocks were skipped, repeated "
            f"or called alone, or {previous} was replaced by another module after the conversion. Remove it, or convert "
            "the model as it is called now; revify.revert gives the plain blocks back."
        )
    if version(x) != link.version:
        raise StreamError(
            f"{name}: the output of {previous} was changed in place on its way here. Use an out-of-place "
            "operation inside of the blocks, or convert the model as it is called now."
        )
    return link


def leave_link(x: Tensor) -> None:
    """Let go of the link that rides on a value, if there is one."""
    carrier(x, "revify_link").__dict__.pop("revify_link", None)


def carrier(x: Tensor, name: str) -> Tensor:
    """The value that carries the rider of this name: FSDP and backward hooks hand on an alias of it."""
    base = x._base
    carried = not x.__dict__.get(name) and base is not None and base.__dict__.get(name)
    return base if carried and base is not None and _same_place(x, base) else x


def _same_place(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())
