"""Split streams: each block of a stage runs its branches between the two halves of the channels.

    x ─┬─ x1 ──(+)── y1 ─┬─ y            a block with two branches, coupling `additive`; with one branch each, successive
       │        │F       │               blocks are F and G
       └─ x2 ──(+)── y2 ─┘
                │G

A block is given and gives the halves side by side, in the shape that it had. What is recorded is a `Rewind`, to which
every block appends its turns; a `Link` on the value that goes from block to block leads to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from revify.couplings.parts import Turn, half_range
from revify.runtime.arguments import split_stream
from revify.runtime.grid import Grid, Resume, stream_dtype
from revify.runtime.layers import Layer
from revify.runtime.links import Link, take_link
from revify.runtime.numbers import Numbers
from revify.runtime.replay import version
from revify.runtime.rewinding import Rewind
from revify.runtime.standing_in import StandIn
from revify.runtime.states import Habits
from revify.runtime.tape import saves_nothing
from revify.runtime.torch_internals import is_autocast, is_transforming


@dataclass(frozen=True, slots=True)
class ChainRule:
    """What the blocks of one split stage share.

    Args:
        names: the blocks' paths, in order.
        axis: of the channels.
        channels: how many there are.
        grid: of the streams, where every part of the coupling is exact on it; None for floats.
    """

    names: tuple[str, ...]
    axis: int
    channels: int
    grid: Grid | None


@dataclass(frozen=True, slots=True)
class Chain:
    """One forward pass through a split stage."""

    rule: ChainRule
    rewind: Rewind


class HalfBranch(nn.Module):
    """A residual branch that maps one half of the channels to the other: called as (z, args, kwargs)."""

    turn: Turn

    def on(self, block: nn.Module) -> Self:
        """The same for a copy of the block."""
        raise NotImplementedError

    def activate(self, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a post-activation block does to its sum; y itself for all others."""
        raise NotImplementedError


class Chained(StandIn):
    """Stands in for the forward of one block of a split stage.

    Args:
        module: the block.
        rule: of the stage.
        index: which block of the stage.
        branches: its branches, in order.
        stream: which argument is the stream.
    """

    def __init__(
        self, module: nn.Module, rule: ChainRule, index: int, branches: tuple[HalfBranch, ...], stream: int | str
    ) -> None:
        super().__init__(module, rule.names[index])
        self.rule, self.index, self.branches, self.stream = rule, index, branches, stream
        self._habits: tuple[dict[str, Habits], ...] = tuple({} for _ in branches)

    def on(self, module: nn.Module) -> Self:
        """The same for a copy of the block."""
        other = super().on(module)
        other.branches = tuple(branch.on(module) for branch in self.branches)
        return other

    def run(self, *args: Any, **kwargs: Any) -> Tensor:  # Any: side inputs of every type pass through
        x, (args, kwargs) = split_stream(self.stream, self.name, args, kwargs)
        branch_dtype = stream_dtype(x.dtype) if is_autocast(x.device.type) else x.dtype
        chain, z = self._take(x, branch_dtype)
        halves = dict(enumerate(self._halves(z)))
        if self.index == 0:
            chain.rewind.enter(self.rule.names[0], x)
            halves = {half: chain.rewind.numbers.held(value) for half, value in halves.items()}
        side = {"args": args, "kwargs": kwargs}
        for index, branch in enumerate(self.branches):
            turn = branch.turn
            name = f"{self.name} ({turn.part.name})"
            layer = Layer(name, turn.part, {turn.letter: branch}, {turn.letter: side}, self._habits[index])
            after = chain.rewind.forward(layer, tuple(halves[half] for half in turn.before))
            halves = dict(zip(turn.after, after, strict=True))
        last = self.index + 1 == len(self.rule.names)
        outputs = tuple(halves[half] for half in self.branches[-1].turn.after)
        (chain.rewind.finish if last else chain.rewind.stop)(outputs)
        value = torch.cat([halves[0], halves[1]], self.rule.axis)
        visible = value.to(branch_dtype)
        if last:
            return self.branches[-1].activate(visible, args, kwargs)
        newest = None if visible is value else value
        visible.revify_link = Link(chain, self.index + 1, None, newest, version(visible))  # type: ignore[attr-defined]
        return visible

    def _take(self, x: Tensor, branch_dtype: torch.dtype) -> tuple[Chain, Tensor]:
        """The record of this forward pass, and the stream."""
        link = take_link(x, self.rule, self.index)
        z = x if link is None or link.newest is None else Resume.apply(x, link.newest)
        if link is not None:
            assert isinstance(link.tape, Chain)  # a rule belongs to the blocks of one stage
            if link.tape.rewind.recorded == saves_nothing(x):
                return link.tape, z
        numbers = Numbers(self.rule.grid, branch_dtype)
        return Chain(self.rule, Rewind(numbers, recorded=saves_nothing(x))), z

    def _halves(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves, each dense in memory, in the order in which z is."""
        flat = (
            z.dim() == 4
            and not is_transforming()
            and z.is_contiguous(memory_format=torch.channels_last)
            and not z.is_contiguous()
        )
        order = torch.channels_last if flat else torch.contiguous_format
        sizes = [part.stop - part.start for part in (half_range(half, self.rule.channels) for half in (0, 1))]
        one, two = (part.contiguous(memory_format=order) for part in torch.split(z, sizes, self.rule.axis))
        return one, two
