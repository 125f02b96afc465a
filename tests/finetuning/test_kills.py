"""A run that is killed, at any moment, goes on as if it had not been; frozen parts stay as they are; disks that refuse."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_finetuning import assert_equal, recipe, weights, write_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import revify
from revify.errors import RevifyError
from revify.finetuning import Recipe, finetune
from revify.finetuning.accelerating import accelerating
from revify.finetuning.training import evaluate

CALIBRATED: dict[str, Any] = {"calibrate": 4, "predictor": "diagonal", "bits": 1, "img_size": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    write_images(folder / "train", "01", 4)
    write_images(folder / "val", "01", 2, first=4)
    return folder


def asked(images: Path, out: Path, **changes: Any) -> Any:
    kwargs = {"patch_size": 8, "depth": 3}
    return recipe(images, out, **{"model_kwargs": kwargs, "batch_size": 4, **CALIBRATED, **changes})


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ended."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finetune(asked(images, out))
    return out


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that dies at its n-th touch of a name or of the disk; whether it died."""
    child = os.fork()
    if child == 0:
        count = 0
        code = 1
        try:
            originals = {name: getattr(os, name) for name in ("replace", "rename", "link", "fsync", "unlink", "mkdir")}

            def deadly(original: Any) -> Any:
                def call(*arguments: Any, **named: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*arguments, **named)

                return call

            for name, original in originals.items():
                setattr(os, name, deadly(original))
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def shown(out: Path) -> dict[str, set[str]]:
    return {
        "files": {path.name for path in out.iterdir()},
        "states": {path.name for path in (out / "state").iterdir()},
        "shown": {path.name for path in next((out / "state").iterdir()).joinpath("shown").iterdir()},
    }


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 12, 17, 22, 27, 30, 33, 36, 40, 45, 50])
@pytest.mark.sampled(4)
def test_a_run_that_is_killed_between_any_two_files_is_resumed(
    images: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "run"
    killed_at(number, lambda: finetune(asked(images, out)))
    finetune(asked(images, out, resume=(out / "recipe.json").exists()))
    assert_equal(weights(out), weights(whole))
    assert_equal(load_file(out / "plain.safetensors"), load_file(whole / "plain.safetensors"))
    assert_equal(load_file(out / "best.safetensors"), load_file(whole / "best.safetensors"))
    assert shown(out) == shown(whole)


def test_a_run_that_is_killed_in_its_first_epoch_can_be_started_again_as_well(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert killed_at(9, lambda: finetune(asked(images, out)))
    assert (out / "recipe.json").exists()
    assert not (out / "last.safetensors").exists()
    finetune(asked(images, out))
    assert_equal(weights(out), weights(whole))


def test_what_a_resume_shows_is_the_epoch_that_it_goes_on_from(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetune(asked(images, out, epochs=1))
    kept = weights(out)
    for path in out.glob("*.safetensors"):
        path.unlink()
    finetune(asked(images, out, epochs=1, resume=True))
    assert_equal(weights(out), kept)


def test_files_of_a_run_have_the_permissions_of_any_other(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    expected = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in whole.iterdir() if path.is_file()}
    assert set(modes.values()) == {expected}, modes


@pytest.mark.parametrize("form", ["best", "last", "plain"])
def test_timm_reads_the_weights_of_a_calibrated_run(whole: Path, form: str) -> None:
    kwargs = {"img_size": 8, "patch_size": 8, "depth": 3, "num_classes": 2}
    made = timm.create_model("test_vit", checkpoint_path=str(whole / f"{form}.safetensors"), **kwargs)
    made.load_state_dict(load_file(whole / f"{form}.safetensors"), strict=True)
    if form != "plain":
        plain = revify.revert(revify.load(whole / f"{form}.safetensors"))
        assert_equal(dict(made.state_dict()), dict(plain.state_dict()))


def test_a_file_system_without_links_gets_copies(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    finetune(asked(images, tmp_path / "run"))
    assert_equal(weights(tmp_path / "run"), weights(whole))
    assert shown(tmp_path / "run") == shown(whole)


@pytest.mark.parametrize("fault", ["mkdir", "replace"])
def test_a_disk_that_cannot_be_written_is_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    out = tmp_path / "run"
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        patch.setattr(os, fault, refuse)
        with pytest.raises(RevifyError, match=r"cannot be written.*Read-only file system"):
            finetune(asked(images, out))


def test_evaluate_leaves_every_module_in_its_own_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)))
    model.train()
    model[1].eval()
    model[2][0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    loader = DataLoader(TensorDataset(torch.randn(6, 4), torch.zeros(6, dtype=torch.long)), batch_size=3)
    with accelerating(Recipe(model="test_vit")) as accelerator:
        evaluate(model, loader, accelerator)
    assert {name: module.training for name, module in model.named_modules()} == before
