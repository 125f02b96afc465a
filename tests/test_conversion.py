"""plan, convert, revert as their users meet them: the same model outside, and the given one untouched."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import zoo
from asserts import Unchanged, assert_same, assert_same_gradients, converted, inputs_of, run
from torch import Tensor, nn

import revify

IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)


def vit(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, img_size=64, **settings)


@pytest.fixture(scope="module")
def converted_vit() -> nn.Module:
    return revify.convert(vit(), bits=2)


# The given model stays as it was


@pytest.mark.parametrize("kind", [*zoo.CONVERTIBLE, *zoo.REFUSED])
@pytest.mark.parametrize("function", [revify.plan, revify.convert])
@pytest.mark.sampled(2)
def test_the_given_model_is_not_changed(
    kind: type[zoo.Net], function: Callable[[nn.Module, tuple[Tensor, ...]], object]
) -> None:
    model = kind().eval()
    model.stem.train()
    model.register_forward_hook(lambda *_: None)
    x = model.example()
    with Unchanged(model):
        try:
            function(model, x)
        except revify.RefusalError:
            assert kind in zoo.REFUSED


def test_the_given_model_still_gives_the_same_and_trains() -> None:
    model = zoo.PostActivationBatchNorm()
    x = inputs_of(model)
    before = run(model, x)
    revify.convert(model, x)
    assert_same(run(model, x), before)


def test_modes_are_kept_part_by_part() -> None:
    model = zoo.TwoStages().eval()
    model.transition.train()
    result = revify.convert(model, model.example())
    assert [m.training for m in result.modules()] == [m.training for m in model.modules()]


# The converted model is the same outside


@pytest.mark.parametrize("kind", zoo.CONVERTIBLE)
def test_same_class_paths_and_state(kind: type[zoo.Net]) -> None:
    model = kind()
    result = revify.convert(model, model.example())
    assert type(result) is type(model)
    assert [(n, type(m)) for n, m in result.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert list(result.state_dict()) == list(model.state_dict())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        assert getattr(result.get_submodule(owner), leaf) is tensor
    assert isinstance(result.revify_plan, revify.Plan)
    assert not hasattr(model, "revify_plan")


@pytest.mark.parametrize("kind", zoo.CONVERTIBLE)
@pytest.mark.parametrize("predictor", ["identity", "midpoint"])
@pytest.mark.sampled(2)
def test_many_bits_keep_the_function(kind: type[zoo.Net], predictor: str) -> None:
    """The coupling adds γ times a forecast's error: little at 8 bits, more at 0."""
    torch.manual_seed(0)
    model = kind().eval()
    x = model.example()
    changes = []
    for bits in (0, 4, 8):
        result = revify.convert(model, x, bits=bits, predictor=predictor, grid=16)
        with torch.no_grad():
            torch.manual_seed(1)
            expected = model(*x)
            torch.manual_seed(1)
            changes.append(float((result(*x) - expected).norm() / expected.norm()))
    assert changes[2] < 0.02
    assert changes[2] < changes[1] < changes[0]


def test_hooks_are_kept_and_fire_once() -> None:
    model = zoo.PreNormBlocks()
    fired = []
    model.blocks[1].register_forward_hook(lambda *_: fired.append("after"))
    model.blocks[1].register_forward_pre_hook(lambda *_: fired.append("before"))
    model.blocks[2].register_full_backward_hook(lambda *_: fired.append("backward"))
    model.register_forward_hook(lambda module, args, output: output * 0)
    result = revify.convert(model, model.example())
    assert fired == []
    output = result(*model.example())
    output.sum().backward()
    assert fired == ["before", "after", "backward"]
    assert not output.any()
    assert len(model.blocks[1]._forward_hooks) == 1


def test_a_hook_registered_later_is_the_converted_models_alone() -> None:
    model = zoo.PreNormBlocks()
    result = revify.convert(model, model.example())
    result.blocks[0].register_forward_hook(lambda *_: None)
    assert not model.blocks[0]._forward_hooks


def test_plain_checkpoint_loads() -> None:
    torch.manual_seed(5)
    other = zoo.PostActivationBatchNorm()
    model = converted(zoo.PostActivationBatchNorm)
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch_load_save(m),
    ],
)
@pytest.mark.parametrize("kind", [zoo.DropoutAndDropPath, zoo.TwoStages])
def test_copies_are_converted_models_of_their_own(
    kind: type[zoo.Net], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = converted(kind, bits=1, transitions="checkpoint")
    twin = copied(model)
    x = inputs_of(model)
    assert_same(run(twin, x), run(model, x, plain=True))
    assert twin.revify_plan == model.revify_plan
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(p.any() for n, p in model.named_parameters() if "weight" in n)
    assert_same_gradients(model, x)


def torch_load_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_half_and_bfloat16_and_back() -> None:
    model = converted(zoo.PreNormBlocks, bits=1)
    x = inputs_of(model)[0]
    for cast in (nn.Module.half, nn.Module.bfloat16):
        shorter = cast(copy.deepcopy(model))
        dtype = next(shorter.parameters()).dtype
        assert_same_gradients(shorter, [x.to(dtype)])
    assert_same_gradients(model.half().float(), [x])


# timm's methods


def test_timm_methods_work(converted_vit: nn.Module) -> None:
    model = copy.deepcopy(converted_vit)
    features = model.forward_features(IMAGE)
    assert torch.equal(model.forward_head(features), model(IMAGE))
    model.reset_classifier(7)
    assert model(IMAGE).shape == (2, 7)
    assert_same_gradients(model, [IMAGE])
    assert model.get_classifier().out_features == 7


@pytest.mark.parametrize("stop_early", [False, True])
def test_forward_intermediates(converted_vit: nn.Module, stop_early: bool) -> None:
    model = copy.deepcopy(converted_vit)
    found = []
    for plain in (True, False):
        model.zero_grad()
        with revify.plain_backward() if plain else torch.enable_grad():
            values = model.forward_intermediates(IMAGE, indices=[1, 3], stop_early=stop_early, intermediates_only=True)
            sum(v.square().sum() for v in values).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(values) == 2
    assert "blocks.3.mlp.fc1.weight" in found[0]
    assert ("blocks.5.mlp.fc1.weight" in found[0]) is False
    assert_same(found[1], found[0])


def test_forward_intermediates_with_the_output(converted_vit: nn.Module) -> None:
    output, values = converted_vit.forward_intermediates(IMAGE, indices=[2])
    (output.sum() + values[0].sum()).backward()
    assert torch.equal(output, converted_vit.forward_features(IMAGE))
    converted_vit.zero_grad()


def test_pruned_model_runs(converted_vit: nn.Module) -> None:
    model = copy.deepcopy(converted_vit)
    model.prune_intermediate_layers([2], prune_head=True)
    assert len(model.blocks) == 3
    assert_same(run(model, [IMAGE]), run(model, [IMAGE], plain=True))


def test_gradient_checkpointing_whose_flag_is_set_afterwards(converted_vit: nn.Module) -> None:
    """It finds nothing to save, so it does no harm, and under ordinary autograd a coded block is like any other."""
    model = copy.deepcopy(converted_vit)
    expected = run(model, [IMAGE], plain=True)
    model.grad_checkpointing = True
    assert_same(run(model, [IMAGE]), expected)
    assert_same(run(model, [IMAGE], plain=True), expected)


def test_gradient_checkpointing_of_a_recurrence_would_run_the_blocks_out_of_order() -> None:
    model = revify.convert(timm.create_model("test_vit"), step="recurrence")
    model.grad_checkpointing = True
    with pytest.raises(revify.StreamError, match=r"its input is not the output of .*gradient checkpointing"):
        run(model, [IMAGE], plain=True)


# revert


@pytest.mark.parametrize("kind", zoo.CONVERTIBLE)
@pytest.mark.parametrize("transitions", ["keep", "checkpoint"])
@pytest.mark.sampled(2)
def test_revert_gives_the_given_model_bit_for_bit(kind: type[zoo.Net], transitions: str) -> None:
    torch.manual_seed(0)
    model = kind()
    x = inputs_of(model)
    plain = revify.revert(revify.convert(model, x, bits=0, transitions=transitions))
    assert not hasattr(plain, "revify_plan")
    assert not any("forward" in vars(m) for m in plain.modules())
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in model.modules()]
    assert all(a is b for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(plain.buffers(), model.buffers(), strict=True))
    assert_same(run(plain, x), run(model, x))


def test_revert_leaves_the_converted_model_as_it_is_and_shares_what_is_trained() -> None:
    model = converted(zoo.PostActivationBatchNorm)
    x = inputs_of(model)
    plain = revify.revert(model)
    model(*x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)
    assert_same(dict(plain.state_dict()), dict(model.state_dict()))
    assert_same_gradients(model, x)
    revify.convert(plain, x)


# Plans that are given


def test_convert_does_exactly_the_given_plan() -> None:
    model = zoo.TwoStages()
    plan = revify.plan(model, model.example(), bits=1, predictor="midpoint", grid=10)
    first = revify.convert(model, plan=revify.Plan.from_json(plan.to_json()))
    assert first.revify_plan == plan
    second = revify.convert(model, model.example(), bits=1, predictor="midpoint", grid=10)
    x = inputs_of(model)
    assert_same(run(first, x), run(second, x))


def test_options_change_the_function() -> None:
    x = inputs_of(zoo.PreNormBlocks())
    outputs = [
        run(converted(zoo.PreNormBlocks, **options), x)["output"]
        for options in ({}, {"bits": 3}, {"predictor": "midpoint"}, {"grid": 6})
    ]
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])


def test_default_is_near_the_plain_model() -> None:
    model = vit().eval()
    with torch.no_grad():
        wanted, found = model(IMAGE), revify.convert(model)(IMAGE)
    assert (found - wanted).norm() / wanted.norm() < 0.1


# Bad input


@pytest.mark.parametrize("function", [revify.plan, revify.convert])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9 is no number of residue bits: give a whole number from 0 to 8"),
        ({"bits": -1}, "bits=-1 is no number of residue bits"),
        ({"bits": 1.5}, "bits=1.5 is no number of residue bits"),
        ({"bits": True}, "bits=True is no number of residue bits"),
        (
            {"predictor": "linear regression"},
            "predictor='linear regression' is not known: choose one of identity, midpoint",
        ),
        ({"grid": 41}, 'grid=41 is no resolution: give "auto" or a whole number q from 0 to 40'),
        ({"grid": -1}, "grid=-1 is no resolution"),
        ({"grid": "fine"}, "grid='fine' is no resolution"),
        ({"transitions": "drop"}, 'transitions=\'drop\' is not known: choose "keep" or "checkpoint"'),
    ],
)
def test_options_out_of_range(function: Callable[..., object], options: dict[str, object], message: str) -> None:
    with pytest.raises(revify.RevifyError) as caught:
        function(zoo.PreNormBlocks(), torch.zeros(zoo.TOKENS), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("function", [revify.plan, revify.convert])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: "resnet50", "expected a torch.nn.Module, got str. Pass the model itself"),
        (
            lambda: converted(zoo.PreNormBlocks),
            "PreNormBlocks is already converted. Use it as it is, or revify.revert",
        ),
        (
            lambda: nn.Sequential(nn.Identity(), converted(zoo.PreNormBlocks)),
            "Sequential holds a module that is already converted (1). Use it as it is",
        ),
        (lambda: nn.DataParallel(zoo.PreNormBlocks()), "wrapped for parallel training"),
        (lambda: torch.jit.trace(zoo.PreNormBlocks(), torch.zeros(zoo.TOKENS)), "a TorchScript module"),
        (lambda: checkpointing(), "gradient checkpointing is switched on (in the model)"),
    ],
)
def test_models_in_a_state_in_which_they_are_not_converted(
    function: Callable[..., object], model: Callable[[], object], message: str
) -> None:
    with pytest.raises(revify.RefusalError) as caught:
        function(model(), torch.zeros(zoo.TOKENS))
    assert message in str(caught.value)


def checkpointing() -> nn.Module:
    model = vit()
    model.set_grad_checkpointing(True)
    return model


def test_checkpointing_of_a_part_is_named() -> None:
    model = timm.create_model("test_convnext")
    model.set_grad_checkpointing(True)
    with pytest.raises(
        revify.RefusalError, match=r"switched on \(in stages.0\).* model.set_grad_checkpointing\(False\)"
    ):
        revify.plan(model)
    model.set_grad_checkpointing(False)
    revify.plan(model)


def test_model_without_configuration_needs_an_example() -> None:
    with pytest.raises(
        revify.RefusalError, match=r"no timm configuration .* Pass one batch: revify.convert\(model, images\)"
    ):
        revify.convert(zoo.PreNormBlocks())


@pytest.mark.parametrize("example", [(), [1, 2], "image"])
def test_example_that_is_no_tensor(example: object) -> None:
    with pytest.raises(revify.RevifyError, match="example: expected a tensor, a tuple of tensors"):
        revify.convert(zoo.PreNormBlocks(), example)


def test_example_of_a_wrong_shape() -> None:
    with pytest.raises(revify.RefusalError, match=r"does not run on an example of shape \[\(2, 5, 9\)\]"):
        revify.convert(zoo.PreNormBlocks(), torch.zeros(2, 5, 9))


def test_example_from_the_configuration_of_timm() -> None:
    assert revify.plan(vit()).example == ((2, 3, 64, 64),)
    assert revify.plan(timm.create_model("test_convnext")).example == ((2, 3, 160, 160),)
    assert revify.plan(timm.create_model("test_vit", in_chans=1)).example == ((2, 1, 160, 160),)
    assert revify.plan(vit().half()).stages[0].dtype == "float16"


def test_nothing_to_revert() -> None:
    with pytest.raises(
        revify.RefusalError, match="PreNormBlocks is not a converted model, so there is nothing to revert"
    ):
        revify.revert(zoo.PreNormBlocks())
