"""The memory-free backward against ordinary autograd on the same converted model: the same bits, in every situation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
import zoo
from asserts import assert_same, assert_same_gradients, both_ways, converted, gradients, inputs_of, run, weights_like
from torch import Tensor, nn

import revify

BITS = (0, 1, 2, 3, 4, 8)
PREDICTORS = ("identity", "midpoint")
BF16 = torch.bfloat16


@pytest.mark.parametrize("kind", zoo.CONVERTIBLE)
@pytest.mark.parametrize(
    ("bits", "predictor", "autocast"),
    [(0, "identity", None), (3, "midpoint", None), (4, "identity", BF16), (0, "midpoint", BF16)],
)
def test_zoo(kind: type[zoo.Net], bits: int, predictor: str, autocast: torch.dtype | None) -> None:
    model = converted(kind, bits=bits, predictor=predictor)
    assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.parametrize("kind", [zoo.DropoutAndDropPath, zoo.PostActivationBatchNorm, zoo.OddChannels])
@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("bits", BITS)
def test_every_coupling(kind: type[zoo.Net], autocast: torch.dtype | None, predictor: str, bits: int) -> None:
    model = converted(kind, bits=bits, predictor=predictor)
    assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.slow
@pytest.mark.parametrize("kind", zoo.CONVERTIBLE)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_zoo_with_every_coupling(kind: type[zoo.Net], predictor: str) -> None:
    for bits in range(9):
        model = converted(kind, bits=bits, predictor=predictor)
        for autocast in (None, BF16, torch.float16):
            assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.sampled(2)
def test_sixty_four_blocks(bits: int, autocast: torch.dtype | None) -> None:
    model = converted(lambda: zoo.PreNormBlocks(64), bits=bits)
    assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, BF16])
@pytest.mark.parametrize("kind", [zoo.PreNormBlocks, zoo.SharedModuleInBlock, zoo.AuxiliaryLoss])
def test_other_precisions(kind: type[zoo.Net], dtype: torch.dtype) -> None:
    """The stream stays on its grid in float32 or longer; the blocks see and return their own type."""
    model = converted(kind, bits=2).to(dtype)
    seen = []
    model.blocks[2].register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    found = assert_same_gradients(model, [x.to(dtype) for x in inputs_of(model)])
    assert seen == [(dtype, dtype)] * 2
    assert found["output"].dtype == dtype


def test_channels_last_values_stay_channels_last() -> None:
    model = converted(zoo.ChannelsLast, bits=1).to(memory_format=torch.channels_last)
    assert_same_gradients(model, inputs_of(model))


def test_gradients_in_float64_are_close_to_finite_differences() -> None:
    """Not only the same as ordinary autograd: right. A coarse step bridges the grid's points."""
    model = converted(zoo.PreNormBlocks, bits=0, grid=20).double()
    x = inputs_of(model)[0].double().requires_grad_()
    model(x).sum().backward()
    direction, step = torch.randn_like(x), 1e-2
    with torch.no_grad():
        measured = (model(x + step * direction).sum() - model(x - step * direction).sum()) / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), measured, rtol=2e-3, atol=1e-4)


# Random numbers


def test_the_seed_reproduces_the_run_and_another_seed_does_not() -> None:
    model = converted(zoo.DropoutAndDropPath, bits=1)
    x = inputs_of(model)
    first, again, other = run(model, x, seed=5), run(model, x, seed=5), run(model, x, seed=6)
    assert_same(again, first)
    assert not torch.equal(other["output"], first["output"])


def test_backward_draws_no_numbers_of_the_users() -> None:
    model = converted(zoo.DropoutAndDropPath)
    x = inputs_of(model)
    states = []
    for plain in (True, False):
        run(model, x, plain=plain)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_numbers_drawn_between_forward_and_backward_do_not_matter() -> None:
    model = converted(zoo.DropoutAndDropPath)
    x = inputs_of(model)
    expected = run(model, x, plain=True)
    torch.manual_seed(1)
    output = model(*x)
    torch.rand(100)
    model.zero_grad()
    (output * weights_like(output)).sum().backward()
    assert_same(gradients(model), {n: g for n, g in expected.items() if n.startswith("grad")})


# Several passes


@pytest.mark.parametrize("kind", [zoo.DropoutAndDropPath, zoo.PostActivationBatchNorm, zoo.TwoStages])
@pytest.mark.parametrize("order", ["sum", "first in, last out", "first in, first out"])
def test_two_forwards_before_backward(kind: type[zoo.Net], order: str) -> None:
    model = converted(kind, bits=1)
    one, two = inputs_of(model, 1)[0], inputs_of(model, 2)[0]

    def steps() -> None:
        a, b = model(one).square().sum(), model(two).cos().sum()
        if order == "sum":
            (a + b).backward()
        else:
            for loss in (b, a) if order == "first in, last out" else (a, b):
                loss.backward()

    both_ways(model, steps)


def test_gradient_accumulation() -> None:
    model = converted(zoo.DropoutAndDropPath, bits=1)

    def steps() -> None:
        for seed in range(3):
            model(*inputs_of(model, seed)).square().mean().backward()

    both_ways(model, steps)


def test_second_backward_with_retain_graph() -> None:
    model = converted(zoo.DropoutAndDropPath, bits=3)
    x = inputs_of(model)
    torch.manual_seed(1)
    loss = model(*x).square().sum()
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    loss.backward()
    assert_same(gradients(model), first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_training_steps_lead_to_the_same_weights() -> None:
    model = converted(zoo.PostActivationBatchNorm, bits=2)
    twin = copy.deepcopy(model)
    for candidate, plain in ((model, False), (twin, True)):
        optimizer = torch.optim.AdamW(candidate.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for _ in range(4):
            with revify.plain_backward() if plain else contextlib.nullcontext():
                candidate(torch.randn(zoo.IMAGE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model.state_dict(), twin.state_dict())


# What is differentiated


def test_autograd_grad_leaves_grad_alone() -> None:
    model = converted(zoo.PreNormBlocks)
    x = inputs_of(model)
    expected = run(model, x, plain=True)
    model.zero_grad()
    output = model(*x)
    found = torch.autograd.grad((output * weights_like(output)).sum(), list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    named = {f"grad {name}": g for (name, _), g in zip(model.named_parameters(), found, strict=True)}
    assert_same(named, {n: g for n, g in expected.items() if n.startswith("grad")})


@pytest.mark.parametrize("block", range(4))
def test_gradient_of_one_block_only(block: int) -> None:
    model = converted(zoo.DropoutAndDropPath, bits=1)
    x = inputs_of(model)
    expected = run(model, x, plain=True)
    model.zero_grad()
    torch.manual_seed(1)
    output = model(*x)
    weight = model.blocks[block].up.weight
    (found,) = torch.autograd.grad((output * weights_like(output)).sum(), [weight])
    assert torch.equal(found, expected[f"grad blocks.{block}.up.weight"])


@pytest.mark.parametrize("kind", [zoo.PreNormBlocks, zoo.DropoutAndDropPath, zoo.SideInputsWithGradient, zoo.TwoStages])
@pytest.mark.parametrize(("bits", "predictor"), [(0, "midpoint"), (2, "identity")])
def test_double_backward(kind: type[zoo.Net], bits: int, predictor: str) -> None:
    model = converted(kind, bits=bits, predictor=predictor)
    x = inputs_of(model)[0].requires_grad_()

    def steps() -> None:
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (slope.square().sum() + model(x).sum()).backward(inputs=list(model.parameters()))

    both_ways(model, steps)


def test_input_without_gradient() -> None:
    model = converted(zoo.DropoutAndDropPath)
    x = inputs_of(model)[0]
    both_ways(model, lambda: model(x).square().sum().backward())
    assert x.grad is None


def test_input_of_the_stage_is_used_by_something_else_and_stays_as_it_was() -> None:
    model = converted(zoo.BlocksInSequential, bits=1)
    x = inputs_of(model)[0]
    kept = x.clone()

    def steps() -> None:
        y = x.clone().requires_grad_()
        z = y * 2
        (model.blocks(z).square().sum() + z.pow(3).sum()).backward()
        model.stem.bias.grad = y.grad.sum((0, 1))

    both_ways(model, steps)
    assert torch.equal(x, kept)


def test_loss_on_values_between_the_blocks() -> None:
    for dtype in (torch.float32, BF16):
        model = converted(zoo.PreNormBlocks, bits=1).to(dtype)
        x = inputs_of(model)[0].to(dtype)

        def steps(model: nn.Module = model, x: Tensor = x) -> None:
            values = [model.stem(x)]
            for block in model.blocks:
                values.append(block(values[-1]))
            sum(((n + 1) * v.float()).square().sum() for n, v in enumerate(values)).backward()

        both_ways(model, steps)


def test_gradient_with_respect_to_a_value_between_the_blocks() -> None:
    model = converted(zoo.PreNormBlocks)
    found = []
    for plain in (True, False):
        with revify.plain_backward() if plain else contextlib.nullcontext():
            middle = model.blocks[1](model.blocks[0](model.stem(*inputs_of(model))))
            loss = model.blocks[3](model.blocks[2](middle)).square().sum()
            found += torch.autograd.grad(loss, middle)
    assert torch.equal(*found)


# Modes and contexts


@contextlib.contextmanager
def autocast_bf16() -> Iterator[None]:
    with torch.autocast("cpu", BF16):
        yield


@pytest.mark.parametrize("around_backward", [contextlib.nullcontext, autocast_bf16])
def test_backward_under_another_autocast_than_forward(
    around_backward: Callable[[], AbstractContextManager[None]],
) -> None:
    model = converted(zoo.TwoAdditionsInABlock)
    x = inputs_of(model)
    forward = autocast_bf16 if around_backward is contextlib.nullcontext else contextlib.nullcontext

    def steps() -> None:
        with forward():
            loss = model(*x).float().square().sum()
        with around_backward():
            loss.backward()

    both_ways(model, steps)


def test_forward_and_backward_within_one_autocast() -> None:
    """Autocast keeps cast weights until it ends: the second run must not leave any that later runs would take."""
    model = converted(zoo.TwoAdditionsInABlock)
    x = inputs_of(model)

    def steps() -> None:
        with autocast_bf16():
            for _ in range(2):
                model(*x).float().square().sum().backward()

    both_ways(model, steps)


@pytest.mark.parametrize("kind", [zoo.DropoutAndDropPath, zoo.PostActivationBatchNorm])
def test_eval_mode(kind: type[zoo.Net]) -> None:
    model = converted(kind).eval()
    assert_same_gradients(model, inputs_of(model))


def test_mode_switched_between_forward_and_backward() -> None:
    model = converted(zoo.PostActivationBatchNorm)
    x = inputs_of(model)

    def steps() -> None:
        model.train()
        loss = model(*x).square().sum()
        model.eval()
        loss.backward()
        assert not any(m.training for m in model.modules())

    both_ways(model, steps)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_without_gradients(context: Callable[[], AbstractContextManager[None]], dtype: torch.dtype) -> None:
    model = converted(zoo.DropoutAndDropPath, bits=1).to(dtype).eval()
    x = [x.to(dtype) for x in inputs_of(model)]
    expected = model(*x)
    with context():
        found = model(*x)
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("without", [(0,), (0, 1), (1,), (1, 2), (3,), (0, 2)])
def test_some_blocks_run_without_gradients(without: tuple[int, ...]) -> None:
    model = converted(zoo.DropoutAndDropPath, bits=1)
    x = inputs_of(model)[0]

    def steps() -> None:
        z = model.stem(x)
        for number, block in enumerate(model.blocks):
            with torch.set_grad_enabled(number not in without):
                z = block(z)
        (z.square().sum() + model.head(z).sum()).backward()

    both_ways(model, steps)


def test_batch_norm_counts_once() -> None:
    model = converted(zoo.PostActivationBatchNorm)
    model(*inputs_of(model)).sum().backward()
    assert [int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [1] * 8


def test_empty_batch() -> None:
    model = converted(zoo.PreNormBlocks, bits=3)
    output = model(torch.zeros(0, 5, 6))
    output.sum().backward()
    assert output.shape == (0, 3)
    assert all(not p.grad.any() for p in model.parameters())


# Hooks


def test_a_hook_on_a_block_fires_once() -> None:
    model = converted(zoo.PreNormBlocks)
    fired = []
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, n=number: fired.append(("before", n)))
        block.register_forward_hook(lambda module, args, output, n=number: fired.append(("after", n)))
    model(*inputs_of(model)).sum().backward()
    assert fired == [(when, n) for n in range(4) for when in ("before", "after")]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_full_backward_hooks_on_blocks_see_the_gradients(dtype: torch.dtype) -> None:
    model = converted(zoo.PreNormBlocks, bits=1).to(dtype)
    seen: list[list[Tensor]] = [[]]
    x = [x.to(dtype) for x in inputs_of(model)]
    for block in model.blocks:
        block.register_full_backward_hook(lambda module, into, out: seen[-1].extend((*into, *out)))
    expected = run(model, x, plain=True)
    seen.append([])
    assert_same(run(model, x), expected)
    assert len(seen[0]) == len(seen[1]) == 8
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*seen, strict=True))


def test_hooks_see_the_gradients_of_a_half_precision_model_as_they_are_in_full_precision() -> None:
    """Nothing is lost on the way through the shorter values between the blocks."""
    slopes = []
    for dtype in (torch.float32, BF16):
        model = converted(zoo.PreNormBlocks, bits=1).to(dtype)
        value = model.blocks[0](model.stem(inputs_of(model)[0].to(dtype)))
        value.retain_grad()
        z = value
        for block in model.blocks[1:]:
            z = block(z)
        z.float().square().sum().backward()
        slopes.append(value.grad.float())
    torch.testing.assert_close(slopes[1], slopes[0], rtol=0.2, atol=0.2)
    assert float(torch.nn.functional.cosine_similarity(*(s.flatten() for s in slopes), 0)) > 0.995


def test_users_saved_tensor_hooks_around_the_model() -> None:
    model = converted(zoo.DropoutAndDropPath)
    x = inputs_of(model)
    expected = run(model, x, plain=True)
    with torch.autograd.graph.save_on_cpu():
        assert_same(run(model, x), expected)


def test_plain_backward_ends_with_its_context_even_after_an_error() -> None:
    model = converted(zoo.PreNormBlocks)
    with pytest.raises(ZeroDivisionError), revify.plain_backward():
        raise ZeroDivisionError
    output = model(*inputs_of(model))
    assert "revify_link" in vars(model.blocks[0](model.stem(*inputs_of(model))))
    assert output.requires_grad
