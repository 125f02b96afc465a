"""Coded steps: the same bits as ordinary autograd on the same coded forward, in every situation, and little held."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import timm
import torch
import zoo
from asserts import assert_same, assert_same_gradients, both_ways, converted, inputs_of, run, weights_like
from ledger import Ledger
from torch import Tensor, nn

import revify
from revify.runtime.coded import CodedRule, CodedStep

BF16 = torch.bfloat16


def coded(kind: Callable[[], nn.Module], **options: object) -> nn.Module:
    return converted(kind, step="coded", **{"bits": 8, **options})


@pytest.mark.parametrize("kind", zoo.CONVERTIBLE)
@pytest.mark.parametrize(
    ("bits", "unit", "autocast"), [(8, "block", None), (4, "block", BF16), (3, "branch", None), (8, "branch", BF16)]
)
def test_zoo(kind: type[zoo.Net], bits: int, unit: str, autocast: torch.dtype | None) -> None:
    model = coded(kind, bits=bits, unit=unit)
    assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", [zoo.DropoutAndDropPath, zoo.PostActivationBatchNorm, zoo.OddChannels])
def test_every_number_of_bits(kind: type[zoo.Net], bits: int) -> None:
    model = coded(kind, bits=bits)
    assert_same_gradients(model, inputs_of(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, BF16])
def test_blocks_see_the_type_in_which_the_stream_came(dtype: torch.dtype) -> None:
    model = coded(zoo.PreNormBlocks).to(dtype)
    seen = []
    model.blocks[2].register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    assert_same_gradients(model, [x.to(dtype) for x in inputs_of(model)])
    assert seen == [(dtype, dtype)] * 2


@pytest.mark.parametrize("kind", zoo.CONVERTIBLE)
def test_in_eval_mode_it_is_the_plain_model(kind: type[zoo.Net]) -> None:
    model = coded(kind).eval()
    plain = revify.revert(model)
    x = inputs_of(model)
    assert_same(run(model, x), run(plain, x))


def test_without_gradients_training_mode_computes_the_same_function() -> None:
    model = coded(zoo.PreNormBlocks, bits=3)
    x = inputs_of(model)
    with torch.no_grad():
        silent = model(*x)
    assert torch.equal(silent, model(*x))
    assert not torch.equal(silent, revify.revert(model)(*x))


def test_nothing_is_added_to_the_state_dict() -> None:
    model = coded(zoo.PreNormBlocks)
    assert model.state_dict().keys() == revify.revert(model).state_dict().keys()


def test_the_last_block_gives_back_what_the_codes_left_out() -> None:
    """With blocks that add a constant, nothing is lost in the end, whatever the bits."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(Constant()) for _ in range(6)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 6, 8)
    running_error = []
    for bits in (2, 4, 8):
        rule = CodedRule(tuple(f"blocks.{n}" for n in range(6)), bits)
        blocks = copy.deepcopy(net.blocks)
        for number, block in enumerate(blocks):
            block.forward = CodedStep(block, rule, number)
        running_error.append(float((blocks(x) - net(x)).detach().abs().max()))
    assert max(running_error) < 2e-6  # rounding of floats, 1.2e-7 relative, over six sums of size 5


# What autograd may ask for


@pytest.mark.parametrize("order", ["sum", "first in, last out", "first in, first out"])
def test_two_forwards_before_backward(order: str) -> None:
    model = coded(zoo.DropoutAndDropPath, bits=4)
    one, two = inputs_of(model, 1)[0], inputs_of(model, 2)[0]

    def steps() -> None:
        a, b = model(one).square().sum(), model(two).cos().sum()
        for loss in ((a + b,), (b, a), (a, b))[("sum", "first in, last out", "first in, first out").index(order)]:
            loss.backward()

    both_ways(model, steps)


def test_second_backward_and_gradients_of_blocks_in_the_middle_run_no_block_but_those_asked_for() -> None:
    model = coded(zoo.PreNormBlocks)
    calls: list[int] = []
    for number, block in enumerate(model.blocks):
        first = next(m for m in block.modules() if not list(m.children()))
        first.register_forward_hook(lambda *_, number=number: calls.append(number))
    x = inputs_of(model)
    loss = (model(*x) * weights_like(model(*x))).sum()
    middle = next(p for p in model.blocks[1].parameters())
    calls.clear()
    (found,) = torch.autograd.grad(loss, [middle], retain_graph=True)
    assert calls == sorted(calls, reverse=True)
    loss.backward()
    assert torch.equal(found, middle.grad)


@pytest.mark.parametrize("which", [0, 2, 3])
def test_a_block_in_eval_mode_is_the_plain_block_and_saves_nothing(which: int) -> None:
    model = coded(zoo.DropoutAndDropPath)
    model.blocks[which].eval()
    both_ways(model, lambda: model(*inputs_of(model)).square().sum().backward())


@pytest.mark.parametrize("frozen", [("stem",), ("stem", "blocks.0", "blocks.1"), ("stem", "blocks"), ("head",)])
def test_frozen_parts(frozen: tuple[str, ...]) -> None:
    model = coded(zoo.PreNormBlocks)
    for path in frozen:
        model.get_submodule(path).requires_grad_(False)
    both_ways(model, lambda: model(*inputs_of(model)).square().sum().backward())


def test_blocks_that_are_skipped_repeated_and_called_in_another_order() -> None:
    model = coded(zoo.PreNormBlocks)

    def steps(order: tuple[int, ...]) -> Callable[[], None]:
        def call() -> None:
            x = model.stem(inputs_of(model)[0])
            for number in order:
                x = model.blocks[number](x)
            x.square().sum().backward()

        return call

    for order in ((0, 2, 3), (1, 1, 1, 2), (3, 2, 1, 0), (0, 1), (2,)):
        both_ways(model, steps(order))


def test_something_between_the_blocks_costs_memory_and_nothing_else() -> None:
    model = coded(zoo.PreNormBlocks)

    def steps() -> None:
        x = model.stem(inputs_of(model)[0])
        for number, block in enumerate(model.blocks):
            x = block(x)
            if number == 1:
                x = x * 1.5
            if number == 2:
                x.mul_(0.5)
        x.square().sum().backward()

    both_ways(model, steps)


def test_values_that_two_consumers_take() -> None:
    model = coded(zoo.PreNormBlocks)

    def steps() -> None:
        x = model.blocks[0](model.stem(inputs_of(model)[0]))
        one, two = model.blocks[1](x), model.blocks[2](x)
        (model.blocks[3](one).sin() + two).square().sum().backward()

    both_ways(model, steps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_flow_as_in_the_plain_model(bad: float) -> None:
    model = coded(zoo.PreNormBlocks)
    x = inputs_of(model)[0].clone()
    x[0].view(-1)[0] = bad
    outcomes = [run(model, [x], plain=plain) for plain in (True, False)]
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, expected in outcomes[0].items():
        assert torch.equal(outcomes[1][name].nan_to_num(7.0), expected.nan_to_num(7.0)), name
    assert not torch.isfinite(outcomes[0]["output"][0]).all()
    assert torch.isfinite(outcomes[0]["output"][1:]).all()


def test_streams_that_outgrow_the_range_are_summed_from_the_start() -> None:
    class Growing(zoo.PreNormBlocks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) * 1e-6
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    model = coded(Growing)
    assert_same_gradients(model, inputs_of(model))


def test_a_sample_does_not_depend_on_the_others_of_its_batch() -> None:
    model = coded(zoo.PreNormBlocks, bits=4)
    x = inputs_of(model)[0]
    others = torch.cat([x[:1], 50 * torch.randn_like(x[1:])])
    torch.manual_seed(0)
    assert torch.allclose(model(x)[0], model(others)[0], rtol=0, atol=0)


# Memory


def test_held_bytes_are_those_of_the_plan() -> None:
    """What depth adds to what is held is the code of one update, to the byte."""
    held = []
    for depth in (4, 12):
        model = coded(lambda depth=depth: zoo.PreNormBlocks(depth), transitions="keep")
        x = inputs_of(model)[0]
        model(x).sum().backward()
        gc.collect()
        with Ledger() as ledger:
            loss = model(x).sum()
            gc.collect()
            held.append(ledger.alive())
        del loss
    plans = [
        coded(lambda depth=depth: zoo.PreNormBlocks(depth), transitions="keep").revify_plan.stages[0].held_bytes
        for depth in (4, 12)
    ]
    small = held[1] - held[0] - (plans[1] - plans[0])
    assert 0 <= small <= 8 * 64  # a few numbers of each step, none of which grows with the stream


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "resnet50"])
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.sampled(2)
def test_timm(name: str, unit: str) -> None:
    torch.manual_seed(0)
    model = revify.convert(timm.create_model(name, num_classes=3), step="coded", bits=8, unit=unit)
    size = (3, 64, 64) if name == "resnet50" else model.default_cfg["input_size"]
    assert_same_gradients(model, [torch.randn(2, *size)])
