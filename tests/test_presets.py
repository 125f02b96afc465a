"""Published methods by name: the formula of each paper, on a small network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from asserts import assert_same_gradients, inputs_of
from branch_nets import Two, net
from torch import Tensor, nn

import revify
from revify import Method, presets

ALL = [value for value in vars(presets).values() if isinstance(value, Method) and value.streams == "full"]
BLOCKS = {
    # z[k+1] from T(z[k]), z[k], z[k-1]
    presets.re2tal: lambda t, z, older: older + (t - z),
    presets.midpoint: lambda t, z, older: older + 2 * (t - z),
    presets.dr2net: lambda t, z, older: t + older / 8,
    presets.idm: lambda t, z, older: (t + older) / 2,
}
BRANCHES = (presets.reformer, presets.revvit)


def converted(preset: Method, **options: int) -> nn.Module:
    torch.manual_seed(0)
    model = net(Two, 4)
    return revify.convert(model, model.example(), method=preset, **options)


@pytest.mark.parametrize("preset", ALL, ids=lambda preset: preset.reference.split(",")[0])
def test_gradients_are_exact(preset: Method) -> None:
    model = converted(preset)
    assert_same_gradients(model, inputs_of(model))


@pytest.mark.parametrize("preset", BLOCKS, ids=lambda preset: preset.reference.split(",")[0])
def test_the_formula_of_the_paper(preset: Method) -> None:
    model, formula = converted(preset, grid=19).eval(), BLOCKS[preset]
    assert largest_difference(model, lambda blocks, x: recurrence(blocks, x, formula)) < 2e-5


@pytest.mark.parametrize("preset", BRANCHES, ids=lambda preset: preset.reference.split(",")[0])
def test_two_streams_of_a_reversible_transformer(preset: Method) -> None:
    def streams(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        x1 = x2 = x
        for block in blocks:
            x1 = x1 + block.one(x2)
            x2 = x2 + block.two(x1)
        return x2

    assert largest_difference(converted(preset, grid=19).eval(), streams) < 2e-5


def test_bdia_has_both_signs_in_training_and_the_plain_blocks_in_eval_mode() -> None:
    model, x = converted(presets.bdia), inputs_of(net(Two, 4))[0]
    plain = revify.revert(model)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    model.train()
    outputs = [model(x) for _ in range(8)]
    assert any(not torch.equal(outputs[0], y) for y in outputs)


def recurrence(blocks: nn.ModuleList, x: Tensor, formula: Callable[..., Tensor]) -> Tensor:
    older, z = x, plain(blocks[0], x)
    for block in blocks[1:]:
        older, z = z, formula(plain(block, z), z, older)
    return z


def plain(block: nn.Module, x: Tensor) -> Tensor:
    return type(block).forward(block, x)


def largest_difference(model: nn.Module, body: Callable[[nn.ModuleList, Tensor], Tensor]) -> float:
    x = inputs_of(model)[0]
    with torch.no_grad():
        expected = model.head(body(model.blocks, model.stem(x)).mean(1))
        return float((model(x) - expected).abs().max())
