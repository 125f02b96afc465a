"""Conversion in place: the model itself is the converted one, and is as it was afterwards, or after an error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import zoo
from asserts import Unchanged, assert_same, assert_same_gradients, inputs_of, run
from torch import Tensor, nn

import revify
from revify.rewriting import applying

KINDS = [
    zoo.PreNormBlocks,
    zoo.PostActivationBatchNorm,
    zoo.TwoStages,
    zoo.ReturnsTuples,
    zoo.ResidualsInALoop,
    zoo.LayersInARow,
    zoo.SideInputsWithGradient,
]
OPTIONS = [{}, {"step": "recurrence", "bits": 2}, {"unit": "branch"}]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["coded", "recurrence", "branch"])


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@every_kind
@every_option
def test_it_is_what_convert_makes(kind: type[zoo.Net], options: dict[str, object]) -> None:
    model = made(kind)
    other = revify.convert(made(kind), inputs_of(model), **options)
    plan = revify.enable(model, inputs_of(model), **options)
    assert plan == model.revify_plan == other.revify_plan
    assert_same(run(model, inputs_of(model)), run(other, inputs_of(model)))
    assert_same_gradients(model, inputs_of(model))


@every_kind
@every_option
def test_afterwards_everything_is_as_before(kind: type[zoo.Net], options: dict[str, object]) -> None:
    model = made(kind)
    x = inputs_of(model)
    expected = run(model, x)
    with Unchanged(model):
        revify.enable(model, x, **options)
        revify.disable(model)
    assert_same(run(model, inputs_of(model)), expected)
    assert [type(value) for m in model.modules() for value in vars(m).values()] == [
        type(value) for m in made(kind).modules() for value in vars(m).values()
    ]


def test_optimizers_averages_and_whoever_holds_a_module_keep_what_is_right() -> None:
    model = made(zoo.PreNormBlocks)
    modules, parameters = list(model.modules()), list(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    held = model.blocks[1]
    average = copy.deepcopy(model)
    revify.enable(model, inputs_of(model))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    before = [p.clone() for p in parameters]
    model(*inputs_of(model)).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, parameters, before))
    assert held is model.blocks[1]
    assert "forward" in vars(held)
    average.load_state_dict(model.state_dict())
    assert torch.equal(average(*inputs_of(model)), revify.revert(model)(*inputs_of(model)))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
def test_a_copy_is_converted_and_its_own(way: Callable[[nn.Module], nn.Module]) -> None:
    model = made(zoo.PreNormBlocks)
    revify.enable(model, inputs_of(model), step="recurrence")
    other = way(model)
    revify.disable(model)
    assert_same_gradients(other, inputs_of(other))
    assert "forward" not in vars(model.blocks[0])


def test_what_was_wrapped_since_speaks_of_the_plain_forward_again() -> None:
    model = made(zoo.PreNormBlocks)
    expected = run(model, inputs_of(model))
    revify.enable(model, inputs_of(model))
    model.forward = partial(torch.amp.autocast("cpu", enabled=False)(model.forward))
    model.blocks[0].forward = partial(model.blocks[0].forward)
    revify.disable(model)
    assert_same(run(model, inputs_of(model)), expected)


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(zoo.LayersInARow)
    x = inputs_of(model)
    expected = run(model, x)

    def fails(*_: object, **__: object) -> None:
        raise revify.RefusalError("no")

    monkeypatch.setattr(applying, "Checkpointed", fails)
    with Unchanged(model), pytest.raises(revify.RefusalError, match="no"):
        revify.enable(model, x)
    monkeypatch.undo()
    assert_same(run(model, x), expected)
    revify.enable(model, x)
    monkeypatch.setattr(applying, "exchange", fails)
    with pytest.raises(revify.RefusalError, match="no"):
        revify.disable(model)
    assert_same_gradients(model, x)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = made(zoo.PreNormBlocks)
    x, other = inputs_of(model), zoo.TwoStages()
    plan = revify.plan(other, other.example())
    with Unchanged(model):
        with pytest.raises(revify.RefusalError, match=r"parameters of their own.*Use revify.convert"):
            revify.enable(model, x, streams="split")
        with pytest.raises(revify.RefusalError, match="not a converted model"):
            revify.disable(model)
        with pytest.raises(revify.RefusalError, match="another architecture"):
            revify.enable(model, plan=plan)
    revify.enable(model, inputs_of(model))
    with pytest.raises(revify.RefusalError, match="already converted"):
        revify.enable(model, inputs_of(model))


def test_predictors_are_fitted_in_place() -> None:
    model, images = made(zoo.PreNormBlocks), torch.randn(16, 5, 6)
    names = list(model.state_dict())
    revify.enable(model, calibration=images, bits=1, predictor="diagonal")
    assert len(model.state_dict()) > len(names)
    assert_same_gradients(model, inputs_of(model))
    revify.disable(model)
    assert list(model.state_dict()) == names


# Gradient checkpointing beside it


def test_checkpointing_that_is_on_is_refused_with_what_to_turn_off() -> None:
    model = timm.create_model("test_vit")
    model.set_grad_checkpointing()
    with pytest.raises(revify.RefusalError, match=r"one of the two is enough.*model\.set_grad_checkpointing\(False\)"):
        revify.enable(model)


def test_checkpointing_that_is_switched_on_later_is_refused() -> None:
    model = timm.create_model("test_vit")
    revify.enable(model)
    model.set_grad_checkpointing(False)
    with pytest.raises(revify.RefusalError, match=r"recomputed already.*Leave this call out, or call revify.disable"):
        model.set_grad_checkpointing()
    copy.deepcopy(model).set_grad_checkpointing(enable=False)
    assert not model.grad_checkpointing
    plain = revify.revert(model)
    revify.disable(model)
    for switched in (plain, model):
        switched.set_grad_checkpointing()
        assert switched.grad_checkpointing


# How timm's users call a model


def test_parts_of_a_model_called_from_outside() -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", depth=4), torch.randn(2, 3, 160, 160)
    revify.enable(model, x)

    def blocks_alone() -> Tensor:
        return model.blocks(model._pos_embed(model.patch_embed(x))).square().sum()

    def intermediates() -> Tensor:
        final, values = model.forward_intermediates(x, indices=2)
        return final.sum() + sum(value.square().sum() for value in values)

    for loss in (blocks_alone, intermediates):
        found = []
        for plain in (True, False):
            model.zero_grad()
            with revify.plain_backward() if plain else torch.enable_grad():
                loss().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert_same(found[1], found[0])
