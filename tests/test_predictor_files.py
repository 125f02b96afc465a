"""What was fitted lies in a file of its own: the main file is timm's, and both together give the calibrated model back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import revify

IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
ARCHITECTURE = {"name": "test_vit", "kwargs": {"num_classes": 10, "img_size": 64}}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, img_size=64)


def fitted(predictor: str) -> nn.Module:
    return revify.calibrate(revify.convert(vit(), step="recurrence", bits=1), IMAGE, predictor=predictor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a calibrated model's two files."""
    folder = tmp_path_factory.mktemp("calibrated")
    revify.save(fitted("diagonal"), folder / "vit.safetensors", ARCHITECTURE)
    return folder


@pytest.fixture
def files(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The main file and that of its predictors, for one test."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (beside,) = tmp_path.glob("vit.predictors-*.safetensors")
    return tmp_path / "vit.safetensors", beside


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as handle:
        return dict(handle.metadata())


def test_timm_and_a_strict_plain_model_read_the_main_file(files: tuple[Path, Path]) -> None:
    main, beside = files
    timm.create_model("test_vit", num_classes=10, img_size=64, checkpoint_path=str(main))
    vit().load_state_dict(safetensors.torch.load_file(main), strict=True)
    assert all("revify_" in name for name in safetensors.torch.load_file(beside))


def test_both_files_may_move_together(files: tuple[Path, Path], tmp_path: Path) -> None:
    main, beside = files
    expected = revify.load(main)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    beside.rename(elsewhere / beside.name)
    assert same(revify.load(main.rename(elsewhere / "renamed.safetensors")), expected)


def test_a_file_of_before_has_the_predictors_in_it(files: tuple[Path, Path]) -> None:
    main, beside = files
    expected = revify.load(main)
    metadata = {key: value for key, value in metadata_of(main).items() if key != "predictors"}
    tensors: dict[str, Tensor] = {**safetensors.torch.load_file(main), **safetensors.torch.load_file(beside)}
    old = main.with_name("old.safetensors")
    safetensors.torch.save_file(tensors, old, metadata)
    beside.unlink()
    loaded = revify.load(old)
    assert same(loaded, expected)
    assert torch.equal(loaded.eval()(IMAGE), expected.eval()(IMAGE))


def test_a_file_that_is_written_again_keeps_no_other_predictors(files: tuple[Path, Path]) -> None:
    main, beside = files
    other = fitted("linear")
    revify.save(other, main, ARCHITECTURE)
    assert same(revify.load(main), other)
    assert beside.exists(), "another file may need it"


def test_predictors_that_are_missing(files: tuple[Path, Path]) -> None:
    main, beside = files
    beside.unlink()
    with pytest.raises(revify.CheckpointError, match=r"which does not lie beside it\. Bring both files"):
        revify.load(main)


@pytest.mark.parametrize("how", ["other values", "another file", "the main file"])
def test_predictors_that_are_others(files: tuple[Path, Path], how: str) -> None:
    main, beside = files
    if how == "other values":
        tensors = {name: value + 1 for name, value in safetensors.torch.load_file(beside).items()}
        safetensors.torch.save_file(tensors, beside, metadata_of(beside))
    elif how == "another file":
        safetensors.torch.save_file({"x": torch.ones(1)}, beside)
    else:
        shutil.copy(main, beside)
    with pytest.raises(revify.CheckpointError, match="Bring the file that was written together with it"):
        revify.load(main)


@pytest.mark.parametrize(
    "name", ["../vit.predictors-0123456789abcdef.safetensors", "/etc/passwd", "vit.safetensors", ""]
)
def test_no_file_of_another_name_is_opened(files: tuple[Path, Path], name: str) -> None:
    main, _ = files
    metadata = metadata_of(main)
    metadata["predictors"] = json.dumps({**json.loads(metadata["predictors"]), "file": name})
    changed = main.with_name("changed.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(main), changed, metadata)
    with pytest.raises(revify.CheckpointError, match="the file of the predictors is to have a name like"):
        revify.load(changed)
