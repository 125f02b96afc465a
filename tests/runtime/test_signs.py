"""The sign of γ: balanced over the depth, or random (BDIA): replayed in training, absent in eval mode."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
from asserts import assert_same, run, weights_like
from torch import Tensor, nn

import revify
from revify.calibration.walking import drawing_signs
from revify.plans import Plan
from revify.runtime.grid import Grid, OnGrid


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", drop_path_rate=0.2)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 160, 160)


@pytest.mark.parametrize(
    ("predictor", "bits", "sign"),
    [("identity", 4, "balanced"), ("identity", 0, "positive"), ("midpoint", 4, "positive"), ("zero", 2, "positive")],
)
def test_defaults(model: nn.Module, predictor: str, bits: int, sign: str) -> None:
    assert {stage.sign for stage in revify.plan(model, predictor=predictor, bits=bits).stages} == {sign}


def test_balanced_signs_are_minus_plus_plus_minus(images: Tensor) -> None:
    """The recurrence by hand, from the plain blocks, and its gradient."""
    model = timm.create_model("test_vit", depth=8).eval()
    converted = revify.convert(model, bits=0, sign="balanced").eval()
    found, wanted = (images.clone().requires_grad_() for _ in range(2))
    output = converted(found)

    def rounded(values: Tensor) -> Tensor:
        return OnGrid.apply(values, Grid(12))

    older = rounded(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(wanted)))))
    z = rounded(model.blocks[0](older))
    for block, sign in zip(model.blocks[1:], (-1, 1, 1, -1, -1, 1, 1), strict=True):
        older, z = z, rounded(block(z)) + sign * (older - z)
    by_hand = model.forward_head(model.norm(z))
    assert torch.equal(output, by_hand)
    for result in (output, by_hand):
        (result * weights_like(result)).sum().backward()
    difference = (found.grad - wanted.grad).norm() / wanted.grad.norm()
    assert difference < 1e-4  # the same sums in another order


@pytest.mark.parametrize("bits", [1, 3])
def test_balanced_signs_change_less_where_blocks_do_alike(images: Tensor, bits: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", depth=9).eval()
    for block in model.blocks[1:]:
        block.load_state_dict(model.blocks[0].state_dict())
    with torch.no_grad():
        wanted = model(images)
        changes = [
            (revify.convert(model, bits=bits, sign=sign).eval()(images) - wanted).norm()
            for sign in ("positive", "balanced")
        ]
    assert changes[1] < 0.7 * changes[0]


@pytest.mark.parametrize("bits", [0, 1, 4])
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.sampled(2)
def test_balanced_gradients_are_those_of_ordinary_autograd(
    model: nn.Module, images: Tensor, bits: int, unit: str
) -> None:
    converted = revify.convert(model, bits=bits, unit=unit, sign="balanced")
    for autocast in (None, torch.bfloat16):
        assert_same(
            run(converted, [images], autocast=autocast), run(converted, [images], plain=True, autocast=autocast)
        )


def test_plans_of_old_have_their_sign(model: nn.Module) -> None:
    """Files from before `sign` say random_sign."""
    plan = json.loads(revify.plan(model).to_json())
    for random_sign, sign in ((False, "positive"), (True, "random")):
        old = copy.deepcopy(plan)
        for stage in old["stages"]:
            del stage["sign"]
            stage["random_sign"] = random_sign
        assert revify.Plan.from_json(json.dumps(old)).stages[0].sign == sign


def test_fitted_predictors_need_no_balance(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model)
    assert revify.calibrate(converted, images, predictor="diagonal").revify_plan.stages[0].sign == "positive"


def test_signs_that_make_no_sense(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(revify.RevifyError, match="sign='minus' is not known: choose one of positive, balanced, random"):
        revify.plan(model, sign="minus")
    with pytest.raises(revify.RevifyError, match='sign="balanced" is for fixed predictors'):
        revify.convert(model, calibration=images, sign="balanced")
    with pytest.raises(revify.RevifyError, match="sign are for full streams"):
        revify.convert(model, streams="split", sign="balanced")


@pytest.mark.parametrize("bits", [0, 1, 3])
@pytest.mark.parametrize("predictor", ["identity", "midpoint"])
@pytest.mark.sampled(2)
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
    return drawing_signs(converted.eval())


def test_plans_that_do_not_say_keep_the_signs_of_their_time(model: nn.Module, images: Tensor) -> None:
    """A file from before there were patterns computes what it computed."""
    plan = revify.plan(model, bits=1)
    fields = json.loads(plan.to_json())
    for stage in fields["stages"]:
        del stage["pattern"]
    older = Plan.from_json(json.dumps(fields))
    assert [stage.pattern for stage in older.stages] == ["+--+"]
    assert [stage.pattern for stage in plan.stages] == ["-++-"]
    outputs = [revify.convert(model, plan=p).eval()(images) for p in (older, plan)]
    assert not torch.equal(*outputs)


def test_signs_of_ones_own(model: nn.Module, images: Tensor) -> None:
    plan = revify.plan(model, bits=1)
    signed = [replace(plan, stages=tuple(replace(s, pattern=p) for s in plan.stages)) for p in ("+", "-+-++")]
    positive = revify.convert(model, bits=1, sign="positive").eval()(images)
    assert torch.equal(revify.convert(model, plan=signed[0]).eval()(images), positive)
    assert not torch.equal(revify.convert(model, plan=signed[1]).eval()(images), positive)
    assert Plan.from_json(signed[1].to_json()) == signed[1]
    with pytest.raises(revify.RevifyError, match="its pattern of signs is not made of"):
        Plan.from_json(signed[1].to_json().replace("-+-++", "-+0"))
