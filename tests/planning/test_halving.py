"""streams="split": couplings between the halves of the channels, on the blocks' own branches, cut or lifted."""

from __future__ import annotations

import functools
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import zoo
from asserts import Unchanged, assert_same, assert_same_gradients, converted, inputs_of, run
from torch import Tensor, nn

import revify
from revify import couplings
from revify.couplings import additive, affine, damped, half, single, swapped
from revify.couplings.formulas import Formula
from revify.measuring.memory import count_memory
from revify.runtime.rewinding import Rewind

EXACT = (additive, swapped, single, half, damped)
REFUSED = {
    zoo.PostNorm: "a norm stands on its shortcut",
    zoo.SumsBehindGates: "an activation stands on its shortcut",
    zoo.ReturnsTuples: "it returns several results",
    zoo.ChangesLayout: "no layer tells which axis of its stream holds the channels",
    zoo.NoParametersInBlocks: "no layer tells which axis of its stream holds the channels",
}


def leapfrog(x1: Tensor, x2: Tensor, F: couplings.Branch) -> couplings.Streams:
    """A coupling of one's own."""
    return x2, x1 + 2 * F(x2)


def split(kind: Callable[[], nn.Module], coupling: Formula = additive, **options: object) -> nn.Module:
    return converted(kind, streams="split", coupling=coupling, **options)


def ways(model: nn.Module) -> list[str]:
    return [half.how for stage in model.revify_plan.stages for block in stage.blocks for half in block.split_branches]


SPLITTABLE = [kind for kind in zoo.CONVERTIBLE if kind not in (*REFUSED, zoo.ScaledSkip)]


@pytest.mark.parametrize("kind", SPLITTABLE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("coupling", [additive, swapped, damped], ids=lambda coupling: coupling.__name__)
@pytest.mark.sampled(3)
def test_gradients_over_the_zoo(kind: Callable[[], nn.Module], coupling: Formula) -> None:
    assert_same_gradients(split(kind, coupling), inputs_of(kind()))


def test_the_scale_of_a_shortcut_goes_with_the_shortcut() -> None:
    model = split(zoo.ScaledSkip)
    x = inputs_of(zoo.ScaledSkip())
    expected, found = run(model, x, plain=True), run(model, x)
    assert_same(found, expected)
    unused = {f"grad {name}" for name, _ in model.named_parameters()} - found.keys()
    assert unused == {f"grad blocks.{k}.skip" for k in range(4)}


@pytest.mark.parametrize("coupling", [*EXACT, leapfrog], ids=lambda coupling: coupling.__name__)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_exact_couplings(coupling: Formula, autocast: torch.dtype | None) -> None:
    model = split(zoo.OddChannels, coupling)
    assert_same_gradients(model, inputs_of(zoo.OddChannels()), autocast=autocast)


@pytest.mark.parametrize("coupling", [*EXACT, affine, leapfrog], ids=lambda coupling: coupling.__name__)
def test_float64_gradients(coupling: Formula) -> None:
    """Affine streams are floats, whose rounding is 1e-16 a step; the others are exact."""
    torch.manual_seed(0)
    plain = zoo.OddChannels().double()
    model = revify.convert(plain, torch.randn(2, 3, 7, dtype=torch.float64), streams="split", coupling=coupling)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log_scale" in name:
                parameter.uniform_(-1, 1)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    expected, found = run(model, (x,), plain=True), run(model, (x,))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-12 * value.norm().clamp_min(1e-3), name
    assert any(expected[f"grad {n}"].any() for n, _ in model.named_parameters() if "log_scale" in n) == (
        coupling is affine
    )


def test_additive_is_what_it_says() -> None:
    """y1 = x1 + F(x2), y2 = x2 + G(y1) with the cut layers, written out."""
    torch.manual_seed(0)
    model = split(zoo.PreNormBlocks, grid=20)
    x = torch.randn(2, 5, 6)

    def branch(block: nn.Module, z: Tensor) -> Tensor:
        return block.down(torch.nn.functional.gelu(block.up(block.norm(z))))

    z = [part.clone() for part in model.stem(x).split(3, dim=2)]
    for number, block in enumerate(model.blocks):
        z[number % 2] = z[number % 2] + branch(block, z[1 - number % 2])
    expected = model.head(torch.cat(z, 2).mean(1))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)  # the grid rounds each branch to 2^-21


def test_cut_layers_have_half_the_width_and_the_rest_is_shared() -> None:
    torch.manual_seed(0)
    plain = zoo.PreNormBlocks()
    x = plain.example()
    with Unchanged(plain):
        model = revify.convert(plain, x, streams="split")
    first, second = model.blocks[0], model.blocks[1]
    assert ways(model) == ["cut"] * 4
    assert (first.up.in_features, first.up.out_features, first.down.out_features) == (3, 12, 3)
    assert first.norm.normalized_shape == (3,)
    assert torch.equal(first.up.weight, plain.blocks[0].up.weight[:, 3:])  # F is given the second half
    assert torch.equal(first.down.weight, plain.blocks[0].down.weight[:3])
    assert torch.equal(second.up.weight, plain.blocks[1].up.weight[:, :3])
    assert torch.equal(second.norm.bias, plain.blocks[1].norm.bias[:3])
    assert model.head.weight is plain.head.weight
    assert first.up.bias is plain.blocks[0].up.bias  # the inner width is kept
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_odd_channels_are_split_unequally() -> None:
    model = split(zoo.OddChannels)
    assert [block.up.in_features for block in model.blocks] == [3, 4, 3, 4]
    assert [block.down.out_features for block in model.blocks] == [4, 3, 4, 3]


def test_attention_that_ties_its_width_is_lifted() -> None:
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=32)
    plan = revify.plan(model, torch.randn(1, 3, 32, 32), streams="split")
    assert [half.how for block in plan.stages[0].blocks for half in block.split_branches] == ["lifted", "cut"] * 2
    assert "2 lifted" in str(plan)
    made = revify.convert(model, plan=plan)
    assert made.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    assert_same_gradients(made, (torch.randn(2, 3, 32, 32),))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "resnet18", "test_mambaout"])
@pytest.mark.sampled(2)
def test_timm_models(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64) if "vit" in name else timm.create_model(name)
    x = torch.randn(2, 3, 64, 64)
    made = revify.convert(model, x, streams="split")
    assert "cut" in ways(made)
    assert_same_gradients(made.train(), (x,))
    assert_same_gradients(made.eval(), (x,), autocast=torch.bfloat16)


def test_activations_move_into_the_branches_and_to_the_end() -> None:
    """Post-activation blocks: x1 + F(relu(x2)), and one relu at the end of the stage."""
    torch.manual_seed(0)
    model = split(zoo.PostActivationBatchNorm)
    values: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, y: values.append(y))
    model(*inputs_of(zoo.PostActivationBatchNorm()))
    assert [bool((value < 0).any()) for value in values] == [True] * (len(values) - 1) + [False]
    assert "into the branches" in str(model.revify_plan)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refusals(kind: type[zoo.Net]) -> None:
    with pytest.raises(revify.RefusalError, match=REFUSED[kind]):
        split(kind)


def test_options_that_do_not_go_together() -> None:
    model = zoo.PreNormBlocks()
    x = model.example()
    for options, text in (
        ({"streams": "half"}, 'choose "full" or "split"'),
        ({"streams": "split", "bits": 2}, "for full streams"),
        ({"streams": "split", "unit": "branch"}, "for full streams"),
        ({"coupling": swapped}, 'coupling= is for streams="split"'),
        ({"streams": "split", "calibration": torch.randn(2, 5, 6)}, "no predictor to calibrate"),
    ):
        with pytest.raises(revify.RevifyError, match=text):
            revify.convert(model, x, **options)
    made = revify.convert(model, x, streams="split")
    with pytest.raises(revify.RefusalError, match="another function"):
        revify.revert(made)
    with pytest.raises(revify.RefusalError, match="has no predictors"):
        revify.calibrate(made, torch.randn(2, 5, 6))


def uncrossed(x1: Tensor, x2: Tensor, F: couplings.Branch, G: couplings.Branch) -> couplings.Streams:
    """Between its branches there are three values: F's result is added after G's call."""
    f = F(x2)
    y2 = x2 + G(x1)
    return x1 + f, y2


def test_couplings_that_cannot_be_parted() -> None:
    model = zoo.PreNormBlocks()
    with pytest.raises(revify.RefusalError, match=r"cannot be solved|cannot be undone|not 2 streams|appears only"):
        revify.plan(model, model.example(), streams="split", coupling=uncrossed)


def test_a_coupling_that_nobody_could_import_goes_with_its_plan() -> None:
    def nested(x1: Tensor, x2: Tensor, F: couplings.Branch) -> couplings.Streams:
        return x2, x1 + F(x2)

    torch.manual_seed(0)
    plain = zoo.PreNormBlocks()
    plans = [
        revify.plan(plain, plain.example(), streams="split", coupling=coupling)
        for coupling in (nested, lambda x1, x2, F: (x2, x1 + F(x2)))
    ]
    one, other = (run(revify.convert(plain, plan=plan), inputs_of(plain)) for plan in plans)
    assert_same(one, other)


def test_a_plan_goes_through_json_and_does_the_same() -> None:
    torch.manual_seed(0)
    plain = zoo.OddChannels()
    plan = revify.plan(plain, plain.example(), streams="split", coupling=leapfrog)
    again = revify.Plan.from_json(plan.to_json(), couplings=[additive, leapfrog])
    assert again == plan
    x = inputs_of(plain)
    assert_same(run(revify.convert(plain, plan=again), x), run(revify.convert(plain, plan=plan), x))


def test_a_coupling_of_ones_own_is_given_again_to_a_plan_that_was_read() -> None:
    """The text of a plan has names only, and nothing that it names is imported."""
    torch.manual_seed(0)
    plain = zoo.OddChannels()
    plan = revify.plan(plain, plain.example(), streams="split", coupling=leapfrog)
    again = revify.Plan.from_json(plan.to_json())
    with pytest.raises(revify.RefusalError, match=r"leapfrog' is not known.*couplings=\[mine\]"):
        revify.convert(plain, plan=again)
    x = inputs_of(plain)
    assert_same(
        run(revify.convert(plain, plan=again, couplings=[leapfrog]), x), run(revify.convert(plain, plan=plan), x)
    )


def test_a_file_names_its_coupling_and_load_is_given_the_formula(tmp_path: Path) -> None:
    model = split(zoo.OddChannels, leapfrog)
    revify.save(model, tmp_path / "m.safetensors")
    with pytest.raises(revify.CheckpointError, match=r"leapfrog' is not known.*load\(file, couplings=\[mine\]\)"):
        revify.load(tmp_path / "m.safetensors", zoo.OddChannels())
    loaded = revify.load(tmp_path / "m.safetensors", zoo.OddChannels(), couplings=[leapfrog])
    x = inputs_of(zoo.OddChannels())
    assert_same(run(loaded, x), run(model, x))
    revify.save(loaded, tmp_path / "again.safetensors")

    def twice(formula: Formula) -> Formula:
        return functools.partial(formula)

    with pytest.raises(revify.CheckpointError, match="2 of the couplings given are called leapfrog"):
        revify.load(tmp_path / "again.safetensors", zoo.OddChannels(), couplings=[twice(leapfrog), twice(leapfrog)])


def test_save_and_load(tmp_path: object) -> None:
    model = split(zoo.OddChannels, affine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    revify.save(model, f"{tmp_path}/m.safetensors")
    loaded = revify.load(f"{tmp_path}/m.safetensors", zoo.OddChannels())
    x = inputs_of(zoo.OddChannels())
    assert_same(run(loaded, x), run(model, x))


def test_the_model_pickles_after_a_forward() -> None:
    model = split(zoo.PreNormBlocks)
    x = inputs_of(zoo.PreNormBlocks())
    expected = run(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(run(torch.load(buffer, weights_only=False), x), expected)


def test_an_auxiliary_loss_two_backwards_and_a_second_forward() -> None:
    model, x = split(zoo.PreNormBlocks), torch.randn(2, 5, 6)

    def gradients(plain: bool) -> list[Tensor]:
        model.zero_grad()
        seen: list[Tensor] = []
        handle = model.blocks[1].register_forward_hook(lambda m, a, y: seen.append(y))
        context = revify.plain_backward() if plain else torch.enable_grad()
        with context:
            loss = model(x).square().sum() + seen[0].square().sum()
            other = model(x * 2).sum()
            loss.backward(retain_graph=True)
            loss.backward()
            other.backward()
        handle.remove()
        return [p.grad.clone() for p in model.parameters()]

    for found, expected in zip(gradients(plain=False), gradients(plain=True), strict=True):
        assert torch.equal(found, expected)


def test_blocks_must_follow_each_other() -> None:
    model = split(zoo.PreNormBlocks)
    x = torch.randn(2, 5, 6)
    y = model.blocks[0](x)
    with pytest.raises(revify.StreamError, match=r"not the output of blocks\.0"):
        model.blocks[1](y + 0)


@pytest.mark.parametrize("coupling", [additive, swapped, single, half, affine], ids=lambda c: c.__name__)
@pytest.mark.sampled(2)
def test_held_bytes_do_not_grow_with_depth(coupling: Formula) -> None:
    """What lives between forward and backward, but for the marks that every block leaves: a checksum or 256 samples."""

    def held(depth: int) -> int:
        torch.manual_seed(0)
        x = torch.randn(16, 50, 64)
        model = revify.convert(
            nn.Sequential(*(zoo.Mlp(64) for _ in range(depth))), x, streams="split", coupling=coupling
        )
        return count_memory(lambda: model(x).square().sum(), x.device).held

    shallow, deep = held(4), held(12)
    assert deep - shallow <= 8 * (2 * 256 * 4 + 400)
    assert shallow - 2 * 16 * 50 * 64 * 4 <= 4 * (2 * 256 * 4 + 400)  # the halves, and the output for its square


def test_damped_streams_hold_their_bits() -> None:
    def held(depth: int) -> int:
        torch.manual_seed(0)
        x = torch.randn(16, 50, 64)
        model = revify.convert(nn.Sequential(*(zoo.Mlp(64) for _ in range(depth))), x, streams="split", coupling=damped)
        return count_memory(lambda: model(x).square().sum(), x.device).held

    bits = 16 * 50 * 64 / 2 / 8  # γ = 1/2 once for each half: one bit, on average for half of the elements a block
    assert held(12) - held(4) == pytest.approx(8 * bits, rel=0.05)


def test_the_inverse_of_the_whole_stage_is_exact() -> None:
    """What backward reconstructs is the stage's input, bit for bit: a wrong bit is a ReplayError."""
    model = split(lambda: zoo.PreNormBlocks(12), swapped)
    assert_same_gradients(model, (torch.randn(2, 5, 6) * 30,))


def test_the_record_is_gone_after_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without help of the garbage collector: nothing holds itself."""
    made: list[weakref.ref[Rewind]] = []

    class Watched(Rewind):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    monkeypatch.setattr("revify.runtime.halves.Rewind", Watched)
    model = split(zoo.PreNormBlocks)
    gc.disable()
    try:
        model(torch.randn(2, 5, 6)).sum().backward()
        assert [record() for record in made] == [None]
        model(torch.randn(2, 5, 6)).sum()
        assert [record() for record in made] == [None, None]
    finally:
        gc.enable()


def mixed(x1: Tensor, x2: Tensor, F: couplings.Branch, G: couplings.PairBranch) -> couplings.Streams:
    """Its first part is exact on the grid, its second is not."""
    y1 = x1 + F(x2)
    s, t = G(y1)
    return y1, x2 * torch.exp(torch.tanh(s)) + t


def test_one_part_that_needs_floats_makes_the_whole_stage_run_in_floats() -> None:
    torch.manual_seed(0)
    model = revify.convert(zoo.PreNormBlocks().double(), torch.randn(2, 5, 6).double(), streams="split", coupling=mixed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log_scale" in name:
                parameter.uniform_(-1, 1)
    x = (torch.randn(2, 5, 6, dtype=torch.float64),)
    expected, found = run(model, x, plain=True), run(model, x)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-12 * value.norm().clamp_min(1e-3), name  # rounding of 1e-16 a step
