"""Copies that share, and plans that do not fit."""

from __future__ import annotations

import pytest
import torch
import zoo
from asserts import Unchanged, assert_same, inputs_of, run
from torch import Tensor, nn

import revify
from revify.rewriting.applying import apply_plan, change_bits, copy_forecasts, remove_plan, share
from revify.runtime.recomputing import Checkpointed
from revify.runtime.steps import Step


def test_shared_copy_is_a_tree_of_its_own_with_the_same_tensors() -> None:
    model = zoo.PostActivationBatchNorm()
    hook = model.blocks[0].register_forward_hook(lambda *_: None)
    twin = share(model)
    assert all(a is not b for a, b in zip(twin.modules(), model.modules(), strict=True))
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(twin.buffers(), model.buffers(), strict=True))
    assert list(twin.blocks[0]._forward_hooks.values()) == list(model.blocks[0]._forward_hooks.values())
    hook.remove()
    assert len(twin.blocks[0]._forward_hooks) == 1


def test_shared_copy_keeps_methods_as_hooks_with_their_object() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen = 0

        def note(self, *_: object) -> None:
            self.seen += 1

    recorder, model = Recorder(), zoo.PreNormBlocks()
    model.blocks[0].register_forward_hook(recorder.note)
    share(model)(*model.example())
    assert recorder.seen == 1


def test_modules_used_twice_are_used_twice_in_the_copy() -> None:
    twin = share(zoo.SharedModuleInBlock())
    assert twin.blocks[0].norm is twin.blocks[3].norm


def test_only_the_forward_of_planned_modules_is_replaced() -> None:
    model = zoo.TwoStages()
    plan = revify.plan(model, model.example(), transitions="checkpoint", step="recurrence")
    result = apply_plan(model, plan)
    replaced = {path: type(vars(m)["forward"]) for path, m in result.named_modules() if "forward" in vars(m)}
    expected: dict[str, type] = {path: Step for stage in zoo.TwoStages.STAGES for path in stage}
    assert replaced == {**expected, "transition": Checkpointed}
    with Unchanged(result):
        remove_plan(result)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: zoo.PreNormBlocks(3), "the plan expects a Mlp at blocks.3, but there is nothing there"),
        (lambda: zoo.TwoAdditionsInABlock(), "the plan expects a Mlp at blocks.0, but there is Attention there"),
    ],
)
def test_plan_of_another_architecture(other: type[zoo.Net], message: str) -> None:
    model = zoo.PreNormBlocks()
    plan = revify.plan(model, model.example())
    with pytest.raises(revify.RefusalError) as caught:
        revify.convert(other(), plan=plan)
    assert message in str(caught.value)
    assert "make one with revify.plan(model)" in str(caught.value)


def test_plan_that_checkpoints_what_is_not_there() -> None:
    model = zoo.TwoStages()
    plan = revify.plan(model, model.example(), transitions="checkpoint")
    model.bridge, model.transition = model.transition, None
    with pytest.raises(revify.RefusalError, match="the plan checkpoints transition, which the model does not have"):
        revify.convert(model, plan=plan)


def test_parametrized_modules_are_converted() -> None:
    """torch's parametrizations change a module's class on the fly."""

    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + weight.flip(0)

    torch.manual_seed(0)
    model = zoo.PreNormBlocks()
    for block in model.blocks:
        torch.nn.utils.parametrize.register_parametrization(block.up, "weight", Symmetric())
    result = revify.convert(model, model.example(), bits=1)
    x = inputs_of(model)
    assert_same(run(result, x), run(result, x, plain=True))
    assert "blocks.0.up.parametrizations.weight.original" in dict(result.named_parameters())


@pytest.mark.parametrize(("step", "bits"), [("recurrence", (0, 3)), ("coded", (2, 6))])
@pytest.mark.parametrize("unit", ["block", "branch"])
def test_other_bits_in_place_are_a_conversion_with_those_bits(unit: str, step: str, bits: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = zoo.TwoAdditionsInABlock()
    x = inputs_of(plain)
    model = revify.convert(plain, x, bits=bits[0], unit=unit, step=step)
    parameters = list(model.parameters())
    other = revify.convert(plain, x, bits=bits[1], unit=unit, step=step)
    before = run(model, x)
    change_bits(model, other.revify_plan)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_same(run(model, x), run(other, x))
    assert not torch.equal(run(model, x)["output"], before["output"])


def test_forecasts_are_copied_into_the_tensors_that_are_there() -> None:
    torch.manual_seed(0)
    plain = zoo.PreNormBlocks()
    x = inputs_of(plain)
    model = revify.calibrate(revify.convert(plain, x), x[0], predictor="linear", trainable=True)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.1
    fitted = revify.calibrate(model, torch.randn(8, 5, 6), predictor="linear", trainable=True)
    held = dict(model.named_parameters())
    assert not torch.equal(run(model, x)["output"], run(fitted, x)["output"])
    copy_forecasts(model, fitted)
    assert all(held[name] is parameter for name, parameter in model.named_parameters())
    assert_same(run(model, x), run(fitted, x))
