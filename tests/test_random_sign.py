"""BDIA's random sign of γ: replayed in training, absent in eval mode."""

from __future__ import annotations

import pytest
import timm
import torch
from asserts import assert_same, run
from torch import Tensor, nn

import revify


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", drop_path_rate=0.2)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 160, 160)


@pytest.mark.parametrize("bits", [0, 1, 3])
@pytest.mark.parametrize("predictor", ["identity", "midpoint"])
def test_gradients_are_those_of_ordinary_autograd(model: nn.Module, images: Tensor, bits: int, predictor: str) -> None:
    converted = revify.convert(model, predictor=predictor, bits=bits, random_sign=True)
    for autocast in (None, torch.bfloat16):
        assert_same(
            run(converted, [images], autocast=autocast), run(converted, [images], plain=True, autocast=autocast)
        )


def test_signs_come_from_the_users_seed(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, bits=1, random_sign=True)
    outputs = [run(converted, [images], seed=seed)["output"] for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_change_is_nearly_zero_on_average(images: Tensor) -> None:
    plain = timm.create_model("test_vit").train()
    converted = revify.convert(plain, bits=1, random_sign=True)
    fixed = revify.convert(plain, bits=1)
    with torch.no_grad():
        wanted = plain(images)
        one = (converted(images) - wanted).norm()
        mean = (torch.stack([converted(images) for _ in range(64)]).mean(0) - wanted).norm()
        biased = (fixed(images) - wanted).norm()
    assert mean < one / 2
    assert mean < biased / 2


def test_eval_mode_is_the_plain_model(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, bits=1, random_sign=True).eval()
    assert torch.equal(converted(images), model.eval()(images))
    converted(images).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None


def test_refused_with_calibration(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(revify.RevifyError, match="random_sign is for fixed predictors"):
        revify.convert(model, calibration=images, random_sign=True)
