"""Files that `save` wrote: read back exactly, read by timm, refused when they are not what they should be."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import revify
from revify import saving

IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
ARCHITECTURE = {"name": "test_vit", "kwargs": {"num_classes": 10, "img_size": 64}}


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", num_classes=10, img_size=64)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, bytes]:
    """A converted ViT and its file's bytes."""
    model = revify.convert(vit(), bits=2)
    path = tmp_path_factory.mktemp("original") / "vit.safetensors"
    revify.save(model, path, ARCHITECTURE)
    return model, path.read_bytes()


@pytest.fixture
def saved(original: tuple[nn.Module, bytes], tmp_path: Path) -> tuple[nn.Module, Path]:
    """A converted ViT and its file, for one test."""
    path = tmp_path / "vit.safetensors"
    path.write_bytes(original[1])
    return copy.deepcopy(original[0]), path


def rewrite(path: Path, **changes: str | None) -> Path:
    """The same weights under changed metadata; None removes an entry."""
    with safetensors.safe_open(path, framework="pt") as handle:
        metadata = {**handle.metadata(), **changes}
    path = path.with_name("changed.safetensors")
    kept = {key: value for key, value in metadata.items() if value is not None}
    safetensors.torch.save_file(safetensors.torch.load_file(path.with_name("vit.safetensors")), path, kept)
    return path


@pytest.mark.parametrize("give", [True, False])
def test_a_round_trip_keeps_weights_plan_and_outputs(saved: tuple[nn.Module, Path], give: bool) -> None:
    model, path = saved
    loaded = revify.load(path, vit(seed=1) if give else None)
    assert type(loaded) is type(model)
    assert loaded.revify_plan == model.revify_plan
    assert loaded.revify_plan.stages[0].bits == 2
    assert_same_state(state(loaded), state(model))
    assert torch.equal(loaded.eval()(IMAGE), model.eval()(IMAGE))


def test_a_loaded_model_trains_as_the_saved_one(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    loaded = revify.load(path)
    for each in (model, loaded):
        each(IMAGE).square().mean().backward()
    for (name, left), right in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), name


def test_batch_norm_statistics_are_kept(tmp_path: Path) -> None:
    def resnet() -> nn.Module:
        return timm.models.ResNet(timm.models.resnet.BasicBlock, (3, 1, 1, 1), channels=(8, 8, 8, 8))

    model = revify.convert(resnet(), example=IMAGE)
    model(IMAGE)
    revify.save(model, tmp_path / "r.safetensors")
    loaded = revify.load(tmp_path / "r.safetensors", resnet())
    assert loaded.bn1.num_batches_tracked == 1
    assert_same_state(state(loaded), state(model))


def test_the_given_model_stays_as_it_was(saved: tuple[nn.Module, Path]) -> None:
    _, path = saved
    given = vit(seed=1)
    before, output = state(given), given.eval()(IMAGE)
    loaded = revify.load(path, given)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert_same_state(state(given), before)
    assert torch.equal(given(IMAGE), output)
    assert "revify_plan" not in vars(given)


def test_the_given_model_decides_dtype_and_mode(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    loaded = revify.load(path, vit().double().eval())
    assert not loaded.training
    assert all(value.dtype == torch.float64 for value in loaded.parameters())
    assert torch.equal(loaded.head.weight, model.head.weight.double())


def test_creating_a_model_draws_no_random_numbers(saved: tuple[nn.Module, Path]) -> None:
    before = torch.get_rng_state()
    revify.load(saved[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_timm_and_plain_torch_read_the_file(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    plain = vit(seed=1)
    plain.load_state_dict(safetensors.torch.load_file(path), strict=True)
    created = timm.create_model("test_vit", num_classes=10, img_size=64, checkpoint_path=str(path))
    for each in (plain, created):
        assert_same_state(state(each), state(model))
        assert torch.equal(each.eval()(IMAGE), revify.revert(model).eval()(IMAGE))


def test_tied_and_strided_tensors_are_written_and_stay_as_they_are(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = vit()
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        fc2 = model.blocks[0].mlp.fc2
        fc2.weight = nn.Parameter(fc2.weight.detach().t().contiguous().t())
        model.register_buffer("scale", torch.ones(1).expand(3))
        return model

    model = revify.convert(tied())
    pointers = {name: value.data_ptr() for name, value in model.state_dict().items()}
    revify.save(model, tmp_path / "t.safetensors")
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == pointers
    assert not model.blocks[0].mlp.fc2.weight.is_contiguous()

    mould = tied()
    del mould.scale
    mould.register_buffer("scale", torch.zeros(3))
    loaded = revify.load(tmp_path / "t.safetensors", mould)
    assert loaded.blocks[0].mlp.fc1.weight is loaded.blocks[1].mlp.fc1.weight
    assert_same_state(state(loaded), state(model))
    mould.load_state_dict(safetensors.torch.load_file(tmp_path / "t.safetensors"), strict=True)


def test_calibrated_predictors_are_kept(tmp_path: Path) -> None:
    model = revify.calibrate(revify.convert(vit(), bits=1), IMAGE, predictor="diagonal")
    revify.save(model, tmp_path / "c.safetensors", ARCHITECTURE)
    loaded = revify.load(tmp_path / "c.safetensors")
    assert any("revify_" in name for name in loaded.state_dict())
    assert_same_state(state(loaded), state(model))
    assert torch.equal(loaded.eval()(IMAGE), model.eval()(IMAGE))
    plain = revify.revert(loaded)
    assert plain.state_dict().keys() == vit().state_dict().keys()
    vit().load_state_dict(plain.state_dict(), strict=True)


def test_the_metadata_says_what_the_file_is(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    with safetensors.safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "revify"
    assert metadata["format_version"] == "1"
    assert metadata["revify_version"] == revify.__version__
    assert revify.Plan.from_json(metadata["plan"]) == model.revify_plan
    assert json.loads(metadata["architecture"]) == ARCHITECTURE


def test_a_file_is_whole_or_absent(saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(saving.os, name, fail)
            with pytest.raises(revify.CheckpointError, match="disk full"):
                revify.save(model, path)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_is_swept_away_and_what_a_living_one_writes_is_not(
    saved: tuple[nn.Module, Path],
) -> None:
    model, path = saved
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    names = {who: f".{path.name}.{number}-0123.tmp" for who, number in (("dead", killed.pid), ("alive", os.getpid()))}
    other = f".other.safetensors.{killed.pid}-0123.tmp"
    for name in (*names.values(), other):
        path.with_name(name).write_bytes(b"half of it")
    revify.save(model, path)
    assert {file.name for file in path.parent.iterdir()} == {path.name, names["alive"], other}


def test_a_new_file_has_the_permissions_of_any_other(saved: tuple[nn.Module, Path]) -> None:
    revify.save(*saved)
    other = saved[1].with_name("other")
    other.touch()
    assert saved[1].stat().st_mode == other.stat().st_mode


def test_a_missing_folder_is_an_error(saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(revify.CheckpointError, match="could not be written"):
        revify.save(saved[0], saved[1].parent / "nowhere" / "x.safetensors")


def test_a_plain_or_wrapped_model_is_not_saved(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    before = path.read_bytes()
    for each in (vit(), nn.Sequential(model), torch.compile(model)):
        with pytest.raises(revify.CheckpointError, match=r"not a converted model.*wrapper"):
            revify.save(each, path)
    assert path.read_bytes() == before


def test_state_that_is_no_tensor_is_not_saved(tmp_path: Path) -> None:
    class Counting(nn.Identity):
        def get_extra_state(self) -> int:
            return 3

    model = vit()
    model.counter = Counting()
    with pytest.raises(revify.CheckpointError, match=r"'counter\._extra_state' is not an ordinary dense tensor"):
        revify.save(revify.convert(model), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        ({"kwargs": {}}, "KeyError"),
        ({"name": "no_such_model"}, "not the name of a timm model"),
        ({"name": "hf-hub:test_vit"}, "not the name of a timm model"),
        ({"name": "test_vit", "kwargs": {"act_layer": nn.GELU}}, "JSON"),
        ({"name": "test_vit", "kwargs": {"checkpoint_path": "x.pth"}}, "'checkpoint_path' opens other files"),
        ("test_vit", "cannot be stored"),
    ],
)
def test_an_architecture_that_cannot_be_stored(saved: tuple[nn.Module, Path], architecture: object, text: str) -> None:
    model, path = saved
    with pytest.raises(revify.CheckpointError, match=text):
        revify.save(model, path.with_name("new.safetensors"), architecture)  # type: ignore[arg-type]
    assert list(path.parent.iterdir()) == [path]


def refused(path: Path, text: str) -> None:
    """Loading fails with `text`, and the given model stays as it was."""
    given = vit(seed=1)
    before = state(given)
    with pytest.raises(revify.CheckpointError, match=text) as caught:
        revify.load(path, given)
    assert str(path) in str(caught.value)
    assert_same_state(state(given), before)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors", "no such file")
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved: tuple[nn.Module, Path], keep: int) -> None:
    path = saved[1].with_name("cut.safetensors")
    path.write_bytes(saved[1].read_bytes()[:keep])
    refused(path, "not a whole safetensors file")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "pickled.pth")
    refused(tmp_path / "pickled.pth", "not a whole safetensors file")
    safetensors.torch.save_file(vit().state_dict(), tmp_path / "plain.safetensors", {"format": "pt"})
    refused(tmp_path / "plain.safetensors", "not a revify checkpoint")
    safetensors.torch.save_file(vit().state_dict(), tmp_path / "bare.safetensors")
    refused(tmp_path / "bare.safetensors", "not a revify checkpoint")


@pytest.mark.parametrize("version", ["2", "", "one", None])
def test_another_format_version_is_refused(saved: tuple[nn.Module, Path], version: str | None) -> None:
    changed = rewrite(saved[1], format_version=version, revify_version="9.9")
    refused(changed, r"written by revify 9\.9; this\s+revify reads version 1")


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": None},
        {"plan": "{"},
        {"plan": "[]"},
        {"plan": '{"model": 3}'},
        {"architecture": None},
        {"architecture": "3"},
        {"architecture": '{"name": "test_vit", "kwargs": {"pretrained": true}}'},
    ],
)
def test_damaged_metadata_is_refused(saved: tuple[nn.Module, Path], changes: dict[str, str | None]) -> None:
    refused(rewrite(saved[1], **changes), "metadata is damaged")


def test_another_model_is_refused(saved: tuple[nn.Module, Path]) -> None:
    longer, shorter = vit(), vit()
    longer.extra = nn.Linear(2, 2)
    shorter.head = nn.Identity()
    for given, text in (
        (
            timm.create_model("test_vit", num_classes=7, img_size=64),
            r"head\.weight \(10, 64\) in the file, \(7, 64\)",
        ),
        (longer, r"missing in the file: extra\.weight"),
        (shorter, r"not in the model: head\."),
        (timm.create_model("test_resnet"), "VisionTransformer and does not fit this ResNet"),
    ):
        with pytest.raises(revify.CheckpointError, match=text):
            revify.load(saved[1], given)


def test_a_converted_model_is_not_a_mould(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    with pytest.raises(revify.CheckpointError, match="already converted"):
        revify.load(path, copy.deepcopy(model))


def test_without_an_architecture_a_model_is_needed(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    revify.save(model, path)
    with pytest.raises(revify.CheckpointError, match=r"timm\.create_model\('test_vit', \.\.\.\)"):
        revify.load(path)


def test_an_architecture_that_timm_cannot_make_is_refused(saved: tuple[nn.Module, Path]) -> None:
    changed = rewrite(saved[1], architecture='{"name": "test_vit", "kwargs": {"no_such_argument": 1}}')
    with pytest.raises(revify.CheckpointError, match="cannot create the stored architecture 'test_vit'"):
        revify.load(changed)


def test_a_path_relative_to_the_working_folder(saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved
    monkeypatch.chdir(path.parent)
    revify.save(model, "again.safetensors")
    assert revify.load("again.safetensors", vit()).revify_plan == model.revify_plan
