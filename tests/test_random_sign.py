"""BDIA's random sign of γ: replayed in training, absent in eval mode."""

from __future__ import annotations

import pytest
import timm
import torch
from asserts import assert_same, run
from torch import Tensor, nn

import revify
from revify.surveying import drawing_signs


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
    converted = revify.convert(model, predictor=predictor, bits=bits, sign="random")
    for autocast in (None, torch.bfloat16):
        assert_same(
            run(converted, [images], autocast=autocast), run(converted, [images], plain=True, autocast=autocast)
        )


def test_signs_come_from_the_users_seed(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, bits=1, sign="random")
    outputs = [run(converted, [images], seed=seed)["output"] for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_change_is_nearly_zero_on_average(images: Tensor) -> None:
    plain = timm.create_model("test_vit").train()
    converted = revify.convert(plain, bits=1, sign="random")
    fixed = revify.convert(plain, bits=1)
    with torch.no_grad():
        wanted = plain(images)
        one = (converted(images) - wanted).norm()
        mean = (torch.stack([converted(images) for _ in range(64)]).mean(0) - wanted).norm()
        biased = (fixed(images) - wanted).norm()
    assert mean < one / 2
    assert mean < biased / 2


def test_eval_mode_is_the_plain_model(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, bits=1, sign="random").eval()
    assert torch.equal(converted(images), model.eval()(images))
    converted(images).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.parametrize("bits", [0, 2])
def test_fitted_predictors_change_less(model: nn.Module, images: Tensor, bits: int) -> None:
    model.eval()
    fixed = revify.convert(model, bits=bits, sign="random")
    fitted = revify.convert(model, calibration=images, predictor="diagonal", bits=bits, sign="random")
    with torch.no_grad():
        wanted = model(images)
        assert torch.equal(fitted(images), wanted)  # eval mode is the plain model
        changes = [
            torch.stack([form(images) - wanted for _ in range(8)]).norm() for form in (signed(fixed), signed(fitted))
        ]
    assert changes[1] < 0.9 * changes[0]


def test_gradients_with_fitted_predictors(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, calibration=images, predictor="linear", bits=1, sign="random")
    assert_same(run(converted, [images]), run(converted, [images], plain=True))


def test_calibration_takes_none_of_the_users_random_numbers(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, sign="random")
    state = torch.get_rng_state()
    first = revify.calibrate(converted, images, predictor="diagonal", bits=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    second = revify.calibrate(converted, images, predictor="diagonal", bits=1)
    assert_same(first.state_dict(), second.state_dict())


def test_auto_bits_allow_for_the_noise(model: nn.Module, images: Tensor) -> None:
    model.eval()
    means, deviations = [], []
    for tolerance in (0.3, 0.02):
        converted = revify.calibrate(
            revify.convert(model, sign="random"), images, predictor="diagonal", bits="auto", tolerance=tolerance
        )
        plan = converted.revify_plan
        means.append(sum(plan.stages[0].step_bits[1:]))
        deviations.append(plan.stages[-1].deviation)
        assert 0 < deviations[-1] <= tolerance
    assert means[0] < means[1]


def signed(converted: nn.Module) -> nn.Module:
    """In eval mode but for the coupling."""
    return drawing_signs(converted.eval(), converted.revify_plan)
