"""Residual branches of a block as modules that run between the halves of the channels."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from revify.couplings.parts import Turn, half_range
from revify.errors import RefusalError
from revify.reading.segments import BranchCode, Segment, find_branches
from revify.runtime.arguments import with_stream
from revify.runtime.grid import Grid
from revify.runtime.halves import ChainRule, HalfBranch
from revify.runtime.numbers import common_grid
from revify.runtime.predictors import PREFIX
from revify.stage_plans import CUT, WHOLE, BlockPlan, StagePlan


def chain_rule(stage: StagePlan, order: tuple[Turn, ...], grid: Grid) -> ChainRule:
    """The rule of a planned stage, whose branches have these turns."""
    assert stage.axis is not None  # only stages with a known axis are split
    common = common_grid((turn.part for turn in order), grid.resolution)
    return ChainRule(tuple(block.path for block in stage.blocks), stage.axis, stage.shape[stage.axis], common)


class Branch(HalfBranch):
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

    def on(self, block: nn.Module) -> Self:
        """The same for a copy of the block."""
        other = copy.copy(self)
        other._modules = {**self._modules, "block": block}
        return other

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

    def activate(self, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a post-activation block does to its sum; y itself for all others."""
        if self.code is None or self.code.activation is None:
            return y
        return self.run(self.code.activation, y, args, kwargs)

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
    whole = [half.how == WHOLE for half in plan.split_branches]
    if not any(whole) and len(codes) != len(plan.split_branches):
        raise RefusalError(
            f"the plan gives {plan.path} {len(plan.split_branches)} branches, but its forward has {len(codes)}. The plan "
            "was made for another version of this block: make one with revify.plan(model)."
        )
    branches = []
    for number, (half, turn) in enumerate(zip(plan.split_branches, order, strict=True)):
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
