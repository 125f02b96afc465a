"""A stream that cannot be followed back is an error that says where and why, and never a wrong gradient."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import zoo
from asserts import Count, assert_same, assert_same_gradients, converted, gradients, inputs_of
from torch import Tensor, nn

import revify
from revify import GridRangeError, ReplayError, StreamError

PRECISIONS = [torch.float32, torch.bfloat16]
STREAMS = [{"bits": 3}, {"bits": 0, "predictor": "midpoint"}, {"streams": "split"}]


def walk(model: nn.Module, order: list[int]) -> Tensor:
    """Call the blocks of a converted network in some order."""
    x = model.stem(inputs_of(model)[0].to(model.stem.weight.dtype))
    for number in order:
        x = model.blocks[number](x)
    return x


# Calls that do not follow the stream


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            [0, 2, 1, 3],
            r"blocks.2 was given the output of blocks.0, which should go to blocks.1: .* Call them in order",
        ),
        ([0, 1, 1], r"blocks.1 was given the output of blocks.1, which should go to blocks.2"),
        ([0, 1, 3], r"blocks.3 was given the output of blocks.1, which should go to blocks.2"),
        ([0, 0], r"blocks.0 was given the output of blocks.0, which should go to blocks.1"),
        ([2], r"blocks.2: its input is not the output of blocks.1. .*blocks were skipped, repeated or called alone"),
        ([0, 1, 2, 3, 1], r"blocks.1: its input is not the output of blocks.0"),
    ],
)
def test_blocks_out_of_order(order: list[int], message: str, dtype: torch.dtype) -> None:
    model = converted(zoo.PreNormBlocks).to(dtype)
    with pytest.raises(StreamError, match=message):
        walk(model, order)


def test_one_value_goes_to_the_next_block_only_once() -> None:
    model = converted(zoo.PreNormBlocks)
    x = walk(model, [0, 1])
    model.blocks[2](x)
    with pytest.raises(StreamError, match=r"blocks.2: its input is not the output of blocks.1"):
        model.blocks[2](x)


def test_stages_are_not_confused() -> None:
    model = converted(lambda: zoo.PreNormBlocks(4))
    other = converted(lambda: zoo.PreNormBlocks(4))
    with pytest.raises(StreamError, match=r"which should go to blocks.1"):
        other.blocks[1](walk(model, [0]))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    "between",
    [
        lambda x: x * 1.0,
        lambda x: x.detach(),
        lambda x: x.clone(),
        lambda x: x.transpose(0, 1),
        lambda x: x.flatten(1).view(x.shape).flip(0),
    ],
)
def test_something_between_two_blocks(between: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    model = converted(zoo.PreNormBlocks).to(dtype)
    model.blocks[1].register_forward_hook(lambda module, args, output: between(output))
    with pytest.raises(
        StreamError, match=r"blocks.2: its input is not the output of blocks.1. Something stands between"
    ):
        walk(model, [0, 1, 2, 3])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_transposed_square_between_two_blocks(dtype: torch.dtype) -> None:
    """It has the address and the shape of what it was made from, and is another value."""

    class Square(zoo.PreNormBlocks):
        SHAPE = (2, 6, 6)

    model = converted(Square).to(dtype)
    model.blocks[1].register_forward_hook(lambda module, args, output: output.transpose(1, 2))
    with pytest.raises(StreamError, match="Something stands between the two blocks"):
        walk(model, [0, 1, 2, 3])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_changed_in_place_on_the_way(dtype: torch.dtype) -> None:

    def double(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.detach().mul_(2)

    model = converted(zoo.PreNormBlocks).to(dtype)
    model.blocks[1].register_forward_hook(double)
    with pytest.raises(StreamError, match=r"blocks.2: the output of blocks.1 was changed in place on its way here"):
        walk(model, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda b, x: b(x=x),
            r"blocks.0: expected its stream, a tensor, as argument 0, got NoneType. Call the block as",
        ),
        (lambda b, x: b([x]), r"blocks.0: expected its stream, a tensor, as argument 0, got list"),
    ],
)
def test_called_in_another_way(call: Callable[[nn.Module, Tensor], Tensor], message: str) -> None:
    model = converted(zoo.PreNormBlocks)
    with pytest.raises(StreamError, match=message):
        call(model.blocks[0], torch.zeros(2, 5, 6))


def test_stream_by_keyword_that_is_missing() -> None:
    model = converted(zoo.SideInputsWithGradient)
    with pytest.raises(StreamError, match=r"blocks.0: expected its stream, a tensor, as keyword 'x', got NoneType"):
        model.blocks[0](torch.ones(5, 6), (2, 3), torch.zeros(2, 5, 6))


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (
            lambda self, x: x.mean(1),
            r"blocks.2: expected an output of the shape of its input, \(2, 5, 6\), got shape \(2, 6\)",
        ),
        (lambda self, x: (x, x), r"blocks.2: expected an output of the shape of its input, \(2, 5, 6\), got tuple"),
        (lambda self, x: x.add_(1), r"blocks.2 changes its input in place, .* \(for activations inplace=False\)"),
    ],
)
def test_block_that_behaves_otherwise_than_planned(replacement: Callable[..., object], message: str) -> None:
    class Moody(zoo.Mlp):
        moody = False

        def forward(self, x: Tensor) -> Tensor:
            return replacement(self, x) if self.moody else super().forward(x)

    model = converted(lambda: zoo.Net(*(Moody() for _ in range(4))))
    assert_same_gradients(model, inputs_of(model))
    model.blocks[2].moody = True
    with pytest.raises(StreamError, match=message):
        walk(model, [0, 1, 2, 3])


# Values outside of the range


def test_overflow_names_the_block_and_a_grid_that_is_wide_enough() -> None:
    model = converted(zoo.PreNormBlocks, grid=12)
    with torch.no_grad():
        model.blocks[2].down.bias.fill_(5000)
    with pytest.raises(
        GridRangeError, match=r"blocks.2: a stream value of magnitude 5\d{3}.* exact range ±4096"
    ) as caught:
        walk(model, [0, 1, 2, 3])
    suggested = [int(digits) for digits in re.findall(r"grid=(\d+)", str(caught.value))]
    assert suggested == [9, 32]
    for grid in (*suggested, "auto"):
        wider = revify.convert(revify.revert(model), inputs_of(model), grid=grid)
        assert_same_gradients(wider, inputs_of(wider))


@pytest.mark.parametrize("predictor", ["identity", "midpoint"])
def test_overflow_of_the_gap_alone(predictor: str) -> None:
    """Two values within the range whose difference is not."""
    model = converted(zoo.PreNormBlocks, predictor=predictor, grid=12)
    with torch.no_grad():
        model.stem.bias.fill_(-3000)
        model.blocks[0].down.bias.fill_(6000)
    with pytest.raises(GridRangeError, match=r"blocks.1: a stream value of magnitude"):
        walk(model, [0, 1, 2, 3])


@pytest.mark.parametrize("options", STREAMS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, revify.plain_backward])
@pytest.mark.parametrize("scale", [1e5, 1e-6])
def test_without_a_memory_free_backward_nothing_of_the_grid_raises(
    options: dict[str, object], context: Callable[[], AbstractContextManager[None]], scale: float
) -> None:
    model = converted(zoo.PreNormBlocks, grid=12, **options)
    x = model.stem(inputs_of(model)[0]).detach() * scale
    blocks = nn.Sequential(*model.blocks)
    with context():
        assert blocks(x).isfinite().all()
    with pytest.raises(GridRangeError):
        blocks(x).sum().backward()


def test_the_range_error_is_an_arithmetic_error() -> None:
    assert issubclass(GridRangeError, ArithmeticError)


@pytest.mark.parametrize("options", STREAMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False])
def test_values_that_are_not_finite_flow_as_in_the_plain_model(
    options: dict[str, object], value: float, training: bool
) -> None:
    """One sample is spoilt: the others stay what they are, the loss is nan, and the next step is right again."""
    model = converted(zoo.PreNormBlocks, **options).train(training)
    x = inputs_of(model)[0]
    clean = model(x)[0]
    spoilt = x.clone()
    spoilt[1, 2, 3] = value
    given = spoilt.clone().requires_grad_()
    output = model(given)
    assert torch.equal(output[0], clean)
    assert output[1].isnan().any()
    with revify.plain_backward():
        assert torch.equal(model(spoilt).nan_to_num(7), output.nan_to_num(7))
    output.sum().backward()
    found = gradients(model)
    model.zero_grad()
    with revify.plain_backward():
        plain = spoilt.clone().requires_grad_()
        model(plain).sum().backward()
    assert_same(
        {n: g.nan_to_num(7) for n, g in found.items()}, {n: g.nan_to_num(7) for n, g in gradients(model).items()}
    )
    assert given.grad[1].isnan().any()
    assert torch.equal(given.grad[0], plain.grad[0])
    assert_same_gradients(model, [x])


@pytest.mark.parametrize("options", STREAMS)
@pytest.mark.parametrize("number", range(4))
def test_a_block_that_gives_nan_gives_nan_gradients(options: dict[str, object], number: int) -> None:
    """What came before it was finite, and is not had again: nothing can be compared, and nothing is claimed."""
    model = converted(zoo.PreNormBlocks, **options)
    handle = model.blocks[number].down.register_forward_hook(lambda module, args, output: output * torch.nan)
    loss = model(*inputs_of(model)).sum()
    assert loss.isnan()
    loss.backward()
    assert all(p.grad.isnan().any() for p in model.stem.parameters())
    handle.remove()
    assert_same_gradients(model, inputs_of(model))


def test_overflow_is_found_in_backward_where_the_stage_was_left_early() -> None:
    model = converted(zoo.PreNormBlocks, grid=12)
    with torch.no_grad():
        model.blocks[1].down.bias.fill_(5000)
    loss = walk(model, [0, 1]).sum()
    with pytest.raises(GridRangeError, match=r"blocks.1: a stream value of magnitude"):
        loss.backward()


def test_model_works_again_after_an_error() -> None:
    model = converted(zoo.DropoutAndDropPath, bits=1, grid=12)
    x = inputs_of(model)[0]
    with pytest.raises(GridRangeError):
        model(x * 1e6)
    assert_same_gradients(model, [x])


# Blocks that do not repeat themselves


class Moving(zoo.Mlp):
    """Python's random numbers, a counter, or a cache: state that revify does not know."""

    how = ""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.how == "python's random numbers":
            return y + self.norm.bias + random.random() / 8
        if self.how == "counts its calls":
            return y + self.norm.bias * 0 + self.count.up() / 8
        if self.how == "saves more":
            return y if self.count.up() == 1 else y + (y - y).exp().log()
        if self.how == "swaps":
            return y.flip(0) if self.count.up() > 1 else y
        return y


def moving(number: int, how: str) -> nn.Module:
    model = converted(lambda: zoo.Net(*(Moving() for _ in range(4))), bits=1)
    model.blocks[number].how = how
    return model


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("how", ["python's random numbers", "counts its calls", "swaps"])
def test_other_values_name_the_block(number: int, how: str) -> None:
    model = moving(number, how)
    loss = model(*inputs_of(model)).square().sum()
    with pytest.raises(
        ReplayError, match=rf"blocks.{number} returned other values when it was run again .*discard them"
    ):
        loss.backward()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_other_values_are_found_where_backward_ends_early(number: int) -> None:
    """Frozen blocks, or gradients of a part: backward never comes to the stage's start."""
    model = moving(number, "counts its calls")
    for part in (model.stem, *model.blocks[:number]):
        part.requires_grad_(False)
    with pytest.raises(ReplayError, match=rf"blocks.{number} returned other values"):
        model(*inputs_of(model)).square().sum().backward()
    model = moving(number, "counts its calls")
    loss = model(*inputs_of(model)).square().sum()
    with pytest.raises(ReplayError, match=rf"blocks.{number} returned other values"):
        torch.autograd.grad(loss, [model.blocks[number].up.weight])


def test_other_values_are_found_after_blocks_without_gradients() -> None:
    model = moving(1, "counts its calls")
    with torch.no_grad():
        x = walk(model, [0])
    for number in (1, 2, 3):
        x = model.blocks[number](x)
    with pytest.raises(ReplayError, match=r"blocks.1 returned other values"):
        x.square().sum().backward()


def test_other_saved_tensors() -> None:
    model = moving(2, "saves more")
    loss = model(*inputs_of(model)).square().sum()
    with pytest.raises(
        ReplayError, match=r"blocks.2 saved \d+ tensors for backward in its first run and \d+ when run again"
    ):
        loss.backward()


def test_plain_backward_runs_each_block_once() -> None:
    model = moving(2, "counts its calls")
    with revify.plain_backward():
        model(*inputs_of(model)).square().sum().backward()
    assert model.blocks[2].count.number == 1


def test_a_backward_inside_of_a_block() -> None:
    class Inner(zoo.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if torch.is_grad_enabled() and getattr(self, "inner", False):
                y = y + torch.autograd.grad(self.up(x).square().sum(), self.up.weight)[0].mean()
            return y

    model = converted(lambda: zoo.Net(*(Inner() for _ in range(4))))
    model.blocks[2].inner = True
    assert_same_gradients(model, inputs_of(model))


# Changes between forward and backward


def test_output_of_the_stage_changed_in_place() -> None:
    model = converted(zoo.PreNormBlocks)
    output = walk(model, [0, 1, 2, 3])
    output.mul_(2)
    with pytest.raises(StreamError, match=r"the output of blocks.3 was changed in place .*clone\(\) first"):
        output.sum().backward()


def test_value_between_the_blocks_changed_in_place() -> None:
    model = converted(zoo.PreNormBlocks)
    middle = walk(model, [0, 1, 2])
    output = model.blocks[3](middle)
    middle.detach().zero_()
    with pytest.raises(StreamError, match=r"the output of blocks.2 was changed in place"):
        output.sum().backward()


def test_side_input_changed_in_place() -> None:
    model = converted(zoo.SideInputsWithGradient)
    x, rope = model.stem(*inputs_of(model)), torch.ones(5, 6)
    for block in model.blocks:
        x = block(rope, (2, 3), x=x)
    rope.zero_()
    with pytest.raises(StreamError, match=r"side input of shape \(5, 6\) was changed in place"):
        x.sum().backward()


@pytest.mark.parametrize("frozen", [0, 2])
def test_parameter_changed_in_place(frozen: int) -> None:
    """As with ordinary autograd: no optimizer step between forward and backward."""
    model = converted(zoo.PreNormBlocks)
    for part in (model.stem, *model.blocks[:frozen]):
        part.requires_grad_(False)
    loss = model(*inputs_of(model)).square().sum()
    with torch.no_grad():
        model.blocks[2].down.bias.add_(1)
    with pytest.raises(
        StreamError, match=r"blocks.2: a parameter of shape \(6,\) was changed in place .*optimizer.step"
    ):
        loss.backward()


def test_tensor_changed_in_place_within_a_block() -> None:
    class Careless(zoo.Mlp):
        careless = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(self.norm(x)).exp()
            z = y * 2
            if self.careless:
                y.mul_(2)
            return x + self.down(z)

    model = converted(lambda: zoo.Net(*(Careless() for _ in range(4))))
    model.blocks[2].careless = True
    with revify.plain_backward(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(*inputs_of(model)).sum().backward()
    with pytest.raises(
        StreamError, match=r"blocks.2: a tensor of shape \(2, 5, 12\) that its backward needs was changed"
    ):
        model(*inputs_of(model)).sum().backward()


def test_parameters_swapped_for_the_forward_only() -> None:
    model = converted(zoo.PreNormBlocks)
    doubled = {name: (p.detach() * 2).requires_grad_() for name, p in model.named_parameters()}
    x = inputs_of(model)[0].requires_grad_()
    output = torch.func.functional_call(model, doubled, (x,))
    output.sum().backward()
    with revify.plain_backward():
        again = inputs_of(model)[0].requires_grad_()
        expected = {name: p.detach().clone().requires_grad_() for name, p in doubled.items()}
        torch.func.functional_call(model, expected, (again,)).sum().backward()
    assert torch.equal(x.grad, again.grad)
    assert all(torch.equal(p.grad, expected[name].grad) for name, p in doubled.items())


def test_a_stream_that_the_grid_would_round_away_is_refused() -> None:
    torch.manual_seed(0)
    model = zoo.PreNormBlocks()
    x = inputs_of(model)[0]
    fine = revify.convert(model, x, grid=12)
    fine(x)
    paths = [planned.path for planned in fine.revify_plan.stages[0].blocks]
    blocks = nn.Sequential(*(fine.get_submodule(path) for path in paths))
    with pytest.raises(GridRangeError, match=rf"{paths[0]}: the largest value that enters the stream is .* finer grid"):
        blocks(x * 1e-6)
