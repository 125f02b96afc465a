"""What a training program does with the values of a stage: forks them, looks at them early, freezes a part of the blocks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import zoo
from asserts import assert_same, assert_same_gradients, converted, gradients, inputs_of
from torch import Tensor, nn

import revify

PRECISIONS = [torch.float32, torch.bfloat16]


class Fork(zoo.Net):
    """What block 1 gives goes to two runs of blocks."""

    def __init__(self, side_first: bool) -> None:
        super().__init__(zoo.Mlp(), zoo.Mlp(), zoo.ScaledSkip.Block(), zoo.ScaledSkip.Block())
        self.side_first = side_first
        self.side = nn.ModuleList(zoo.Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        results = []
        for blocks in (self.side, self.blocks[2:]) if self.side_first else (self.blocks[2:], self.side):
            y = x
            for block in blocks:
                y = block(y)
            results.append(y.mean(1))
        return self.head(results[0] * results[1])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("side_first", [True, False])
def test_a_value_of_one_stage_is_the_input_of_another(
    side_first: bool, unit: str, autocast: torch.dtype | None
) -> None:
    model = converted(lambda: Fork(side_first), bits=2, unit=unit)
    found = [[block.path for block in stage.blocks] for stage in model.revify_plan.stages]
    assert len(found) > 1
    assert sum(map(len, found)) == 7
    assert_same_gradients(model, inputs_of(model), autocast=autocast)


def both_ways(model: nn.Module, steps: Callable[[], None]) -> None:
    """Whatever `steps` do with the model, the parameters' gradients come out the same in both backwards."""
    outcomes = []
    for plain in (True, False):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        with revify.plain_backward() if plain else contextlib.nullcontext():
            steps()
        outcomes.append(gradients(model))
    assert any(g.any() for g in outcomes[0].values())
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("bits", [0, 3])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("at", [(0,), (1,), (0, 2), (1, 2)])
def test_backward_of_auxiliary_losses_before_the_forward_goes_on(
    at: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    model = converted(zoo.DropoutAndDropPath, bits=bits).to(dtype)

    def steps() -> None:
        x = model.stem(inputs_of(model)[0].to(dtype))
        for number, block in enumerate(model.blocks):
            x = block(x)
            if number in at:
                x.float().square().sum().backward(retain_graph=True)
        x.float().cos().sum().backward()

    both_ways(model, steps)


# Random signs with blocks in eval mode


@pytest.mark.parametrize("still", [(0,), (0, 1), (1,), (1, 2), (3,), (0, 2), (2, 3)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_random_signs_with_some_blocks_in_eval_mode(still: tuple[int, ...], frozen: bool, dtype: torch.dtype) -> None:
    """They are the plain blocks; behind them the stream begins anew."""
    model = converted(zoo.DropoutAndDropPath, bits=1, sign="random").to(dtype)
    x = inputs_of(model)[0].to(dtype)
    for number in still:
        model.blocks[number].eval().requires_grad_(not frozen)
    both_ways(model, lambda: model(x).float().square().sum().backward())
    plain = revify.revert(model)
    values: list[Tensor] = []
    for number in still:
        model.blocks[number].register_forward_hook(lambda module, args, output: values.extend((args[0], output)))
        model(x)
        assert torch.equal(values[-1], plain.blocks[number](values[-2]))
        values.clear()


def test_all_in_eval_mode_but_one_block() -> None:
    model = converted(zoo.DropoutAndDropPath, bits=1, sign="random").eval()
    x = inputs_of(model)[0]
    expected = revify.revert(model)(x)
    assert torch.equal(model(x), expected)
    model.blocks[2].train()
    both_ways(model, lambda: model(x).square().sum().backward())
    twin = copy.deepcopy(model)
    assert_same_gradients(twin, [x])
