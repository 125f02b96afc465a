"""What blocks keep by themselves is in the plan: attributes, and custom Functions that keep what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from asserts import assert_same_gradients, inputs_of
from torch import Tensor

import revify

STREAM = 2 * 5 * 6 * 4


class KeepsAnAttribute(zoo.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        self.last = y.detach()
        return x + self.down(torch.nn.functional.gelu(y))


class Keeping(torch.autograd.Function):
    """Keeps its input where no hook on saved tensors sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.x


class KeepsInAFunction(zoo.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.down(Keeping.apply(self.up(self.norm(x))))


class KeepsTheStream(zoo.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * Keeping.apply(x)


@pytest.mark.parametrize(
    ("block", "each"), [(KeepsAnAttribute, 2 * STREAM), (KeepsInAFunction, 2 * STREAM), (KeepsTheStream, STREAM)]
)
def test_what_blocks_keep_is_counted_and_said(block: type[zoo.Mlp], each: int) -> None:
    plans = []
    for depth in (4, 8):
        torch.manual_seed(0)
        model = zoo.Net(*(block() for _ in range(depth)))
        plans.append(revify.plan(model, model.example(), bits=0))
    few, many = (plan.stages[0].held_bytes for plan in plans)
    assert many - few == 4 * each
    assert "which grows with its depth: blocks.0 and others hold values as attributes" in str(plans[1])
    converted = revify.convert(model, model.example())
    if block is not KeepsAnAttribute:
        assert_same_gradients(converted, inputs_of(model))


@pytest.mark.parametrize("net", [zoo.PreNormBlocks, zoo.TwoStages, zoo.DropoutAndDropPath, zoo.TwoAdditionsInABlock])
def test_ordinary_blocks_keep_nothing(net: type[zoo.Net]) -> None:
    torch.manual_seed(0)
    model = net()
    plan = revify.plan(model, model.example())
    assert all(block.kept_bytes == 0 for stage in plan.stages for block in stage.blocks)
    assert "more, which grows" not in str(plan)
