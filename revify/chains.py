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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from revify.arithmetic import Numbers, common_grid
from revify.compiling import hidden_from_compiler
from revify.cutting import half_range
from revify.errors import RefusalError
from revify.layers import Layer
from revify.links import Link, split_stream, take_link
from revify.parts import Turn
from revify.plans import CUT, WHOLE, BlockPlan, StagePlan
from revify.predictors import PREFIX
from revify.replay import version
from revify.rewinding import Rewind
from revify.runtime import saves_nothing
from revify.segments import BranchCode, Segment, find_branches, with_stream
from revify.stream import Grid, Resume, stream_dtype


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

    @classmethod
    def of(cls, stage: StagePlan, order: tuple[Turn, ...], resolution: int) -> ChainRule:
        """The rule of a planned stage, whose branches have these turns."""
        assert stage.axis is not None  # only stages with a known axis are split
        grid = common_grid((turn.part for turn in order), resolution)
        return cls(tuple(block.path for block in stage.blocks), stage.axis, stage.shape[stage.axis], grid)


@dataclass(frozen=True, slots=True)
class Chain:
    """One forward pass through a split stage."""

    rule: ChainRule
    rewind: Rewind


class Branch(nn.Module):
    """f of one residual branch, from one half of the channels to the other; it is in no module tree.

    Args:
        block: the module whose children the branch calls.
        code: the branch; None for the whole block without its shortcut, T(x) − x.
        lifted: whether the layers are as wide as before: f is then S f(E x), E filling the other half with zeros, S
            taking a half of the result.
        activated: whether what a post-activation block does to its sum is done to what comes in.
        turn: which halves.
        rule: of the stage.
        scale: name of the block's parameter w where the coupling asks for a log-scale, too: that is w·f.
    """

    def __init__(
        self,
        block: nn.Module,
        code: BranchCode | None,
        *,
        lifted: bool,
        activated: bool,
        turn: Turn,
        rule: ChainRule,
        stream: int | str,
        scale: str = "",
    ) -> None:
        super().__init__()
        self.block, self.code, self.lifted, self.activated = block, code, lifted, activated
        self.turn, self.rule, self.stream, self.scale = turn, rule, stream, scale

    def forward(self, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """f of a half of the channels, in the type it is given; with w·f before it where the coupling scales."""
        if self.code is not None and self.code.activation is not None and self.activated:
            z = self.run(self.code.activation, z.clone(), args, kwargs)  # it may work in place
        if self.lifted:
            z = self._widened(z)
        if self.code is None:
            given, named = with_stream(self.stream, z, args, kwargs)
            f = type(self.block).forward(self.block, *given, **named) - z
        else:
            f = self.run(self.code.run, z, args, kwargs)
        if self.lifted:
            part = half_range(self.turn.gives, self.rule.channels)
            f = f.narrow(self.rule.axis, part.start, part.stop - part.start)
        if not self.scale:
            return f
        weight: Tensor = getattr(self.block, self.scale)
        return weight.to(f.dtype).view(-1, *(1,) * (f.dim() - self.rule.axis - 1)) * f, f

    def run(self, code: Segment, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A part of the block's code on z."""
        given, named = with_stream(self.stream, z, args, kwargs)
        result: Tensor = code(self.block, *given, **named)
        return result

    def _widened(self, z: Tensor) -> Tensor:
        """E: zeros for the channels of the other half."""
        part = half_range(self.turn.takes, self.rule.channels)
        after = z.dim() - self.rule.axis - 1
        return functional.pad(z, (*(0, 0) * after, part.start, self.rule.channels - part.stop))


class Chained:
    """Stands in for the forward of one block of a split stage.

    Args:
        block: the module.
        rule: of the stage.
        index: which block of the stage.
        branches: its branches, in order.
        stream: which argument is the stream.
    """

    def __init__(
        self, block: nn.Module, rule: ChainRule, index: int, branches: tuple[Branch, ...], stream: int | str
    ) -> None:
        self.block, self.rule, self.index, self.branches, self.stream = block, rule, index, branches, stream

    @hidden_from_compiler
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # Any: side inputs of every type pass through
        x, (args, kwargs) = split_stream(self.stream, self.rule.names[self.index], args, kwargs)
        branch_dtype = stream_dtype(x.dtype) if torch.is_autocast_enabled(x.device.type) else x.dtype
        chain, z = self._take(x, branch_dtype)
        halves = dict(enumerate(self._halves(z)))
        if self.index == 0:
            chain.rewind.enter(self.rule.names[0], x)
            halves = {half: chain.rewind.numbers.held(value) for half, value in halves.items()}
        side = {"args": args, "kwargs": kwargs}
        for branch in self.branches:
            turn = branch.turn
            name = f"{self.rule.names[self.index]} ({turn.part.name})"
            layer = Layer(name, turn.part, {turn.letter: branch}, {turn.letter: side})
            after = chain.rewind.forward(layer, tuple(halves[half] for half in turn.before))
            halves = dict(zip(turn.after, after, strict=True))
        last = self.index + 1 == len(self.rule.names)
        outputs = tuple(halves[half] for half in self.branches[-1].turn.after)
        (chain.rewind.finish if last else chain.rewind.stop)(outputs)
        value = torch.cat([halves[0], halves[1]], self.rule.axis)
        visible = value.to(branch_dtype)
        if last:
            return self._activated(visible, args, kwargs)
        newest = None if visible is value else value
        visible.revify_link = Link(chain, self.index + 1, None, newest, version(visible))  # type: ignore[attr-defined]
        return visible

    def _take(self, x: Tensor, branch_dtype: torch.dtype) -> tuple[Chain, Tensor]:
        """The record of this forward pass, and the stream."""
        link = take_link(x, self.rule, self.index)
        z = x if link is None or link.newest is None else Resume.apply(x, link.newest)
        if link is not None:
            assert isinstance(link.tape, Chain)  # a rule belongs to the blocks of one stage
            if link.tape.rewind.recorded == saves_nothing():
                return link.tape, z
        numbers = Numbers(self.rule.grid, branch_dtype)
        return Chain(self.rule, Rewind(numbers, recorded=saves_nothing())), z

    def _halves(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves, each dense in memory, in the order in which z is."""
        flat = z.dim() == 4 and z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous()
        order = torch.channels_last if flat else torch.contiguous_format
        sizes = [part.stop - part.start for part in (half_range(half, self.rule.channels) for half in (0, 1))]
        one, two = (part.contiguous(memory_format=order) for part in torch.split(z, sizes, self.rule.axis))
        return one, two

    def _activated(self, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """At the end of the stage: what a post-activation block does to its sum."""
        code = self.branches[-1].code
        if code is None or code.activation is None:
            return y
        return self.branches[-1].run(code.activation, y, args, kwargs)


def make_branches(
    block: nn.Module, plan: BlockPlan, rule: ChainRule, index: int, order: tuple[Turn, ...]
) -> tuple[Branch, ...]:
    """The branches of a block, as its plan says.

    Args:
        block: the module, cut already; where the coupling asks for log-scales it gets parameters for them, zero.
        plan: of the block.
        rule: of its stage.
        index: which block of the stage.
        order: the turns of its branches.

    Raises:
        RefusalError: the block has other branches than when it was planned.
    """
    codes = find_branches(block, plan.stream, plan.inputs)
    whole = [half.how == WHOLE for half in plan.halves]
    if not any(whole) and len(codes) != len(plan.halves):
        raise RefusalError(
            f"the plan gives {plan.path} {len(plan.halves)} branches, but its forward has {len(codes)}. The plan was made "
            "for another version of this block: make one with revify.plan(model)."
        )
    branches = []
    for number, (half, turn) in enumerate(zip(plan.halves, order, strict=True)):
        scale = ""
        if turn.results > 1:
            part = half_range(turn.gives, rule.channels)
            scale = f"{PREFIX}log_scale_{number}"
            like = next(block.parameters())
            weight = torch.zeros(part.stop - part.start, dtype=like.dtype, device=like.device)
            block.register_parameter(scale, nn.Parameter(weight))
        branches.append(
            Branch(
                block,
                None if half.how == WHOLE else codes[number],
                lifted=half.how != CUT,
                activated=index > 0,
                turn=turn,
                rule=rule,
                stream=plan.stream,
                scale=scale,
            )
        )
    return tuple(branches)
