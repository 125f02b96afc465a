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


# Outputs of a stage that the model changes in place


class InPlaceAfterwards(zoo.Net):
    def __init__(self, how: str) -> None:
        super().__init__(*(zoo.Mlp() for _ in range(4)))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = skip = self.stem(x)
        for block in self.blocks:
            x = block(x)
        if self.how == "relu_":
            torch.relu_(x)
        else:
            x += skip
        return self.head(x.mean(1))


@pytest.mark.parametrize("how", ["relu_", "+="])
@pytest.mark.parametrize("options", [{}, {"bits": 0}, {"unit": "branch"}, {"streams": "split"}, {"sign": "random"}])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_output_of_a_stage_is_changed_in_place(
    how: str, options: dict[str, object], autocast: torch.dtype | None
) -> None:
    model = converted(lambda: InPlaceAfterwards(how), **options)
    assert [stage.copied for stage in model.revify_plan.stages] == [True]
    assert_same_gradients(model, inputs_of(model), autocast=autocast)
    assert not converted(zoo.PreNormBlocks).revify_plan.stages[0].copied


# Frozen parts


@pytest.mark.parametrize("trained", [(), ("head",), ("blocks.3", "head"), ("stem",), ("blocks.1",)])
@pytest.mark.parametrize("kind", [zoo.PreNormBlocks, zoo.DropoutAndDropPath, zoo.BranchesOnData])
def test_what_is_frozen_makes_no_difference_to_the_plan(kind: type[zoo.Net], trained: tuple[str, ...]) -> None:
    def frozen() -> nn.Module:
        model = kind().requires_grad_(False)
        for path in trained:
            model.get_submodule(path).requires_grad_(True)
        return model

    model = converted(frozen)
    assert model.revify_plan == converted(kind).revify_plan
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: name.startswith(trained) for name in flags} or not trained
    assert_same_gradients(model, inputs_of(model))
    fitted = revify.calibrate(model, *inputs_of(model), predictor="diagonal", bits=1)
    assert_same_gradients(fitted, inputs_of(fitted))


# Tensors of other kinds


class ComplexBlock(zoo.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.complex(self.up(x.real)[..., :6], self.down(self.up(x.imag)))


class ComplexStream(zoo.Net):
    def __init__(self) -> None:
        super().__init__(*(ComplexBlock() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        z = torch.complex(x, x)
        for block in self.blocks:
            z = block(z)
        return self.head(z.abs().mean(1))


def test_complex_streams_make_no_stage() -> None:
    model = converted(ComplexStream)
    assert not model.revify_plan.stages
    assert any("its stream is of complex numbers, which have no grid" in r.reason for r in model.revify_plan.refusals)


class SparseBlock(zoo.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        mixing = torch.eye(5).to_sparse()
        return x + self.down(self.up(torch.stack([torch.sparse.mm(mixing, sample) for sample in self.norm(x)])))


class SparseMatrices(zoo.Net):
    """Autograd saves sparse tensors, in the blocks and in the stem."""

    def __init__(self) -> None:
        super().__init__(*(SparseBlock() for _ in range(3)))
        self.stem = SparseBlock()


def test_sparse_tensors_are_saved() -> None:
    model = converted(SparseMatrices)
    assert_same_gradients(model, inputs_of(model))


@pytest.mark.parametrize("options", [{}, {"unit": "branch"}, {"streams": "split"}, {"sign": "random"}])
@pytest.mark.parametrize("kind", [zoo.PreNormBlocks, zoo.TwoStages])
def test_a_converted_model_runs_without_data(kind: type[zoo.Net], options: dict[str, object]) -> None:
    model = converted(kind, **options)
    x = inputs_of(model)[0].to("meta")
    empty = copy.deepcopy(model).to("meta")
    empty(x).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in empty.parameters())
