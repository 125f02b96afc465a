"""Folders of images: every usual format, 16 bits, no class that is none, nothing left out in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from revify.errors import RevifyError
from revify.finetuning.data import Images, open_data
from revify.finetuning.folders import ENDINGS, read_folder

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def put(path: Path, image: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(GREY)).save(path)
    return path


def two_classes(folder: Path, count: int = 2) -> Path:
    for name in "ab":
        for number in range(count):
            put(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path, ending: str, mode: str) -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    path = put(tmp_path / f"deep.{ending}", deep)
    opened = Images([(path, 0)], mode)._open(path)
    assert np.array_equal(np.asarray(opened.convert("L")), GREY)
    assert opened.mode == mode


def test_thirty_two_bits_are_refused_by_name(tmp_path: Path) -> None:
    path = put(tmp_path / "float.tiff", Image.fromarray(GREY.astype(np.float32) / 255))
    with pytest.raises(RevifyError, match=r"float\.tiff cannot be read \(it has 32 bits a pixel"):
        Images([(path, 0)])._open(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_usual_format_is_read(tmp_path: Path, ending: str) -> None:
    for name in "ab":
        for number in range(2):
            put(tmp_path / name / f"{number}{ending.upper() if number else ending}")
    data = open_data(tmp_path, 3)
    assert len(data.train) + len(data.validation) == 4
    assert data.remarks == ()
    for path, _ in data.train.samples:
        assert data.train._open(path).mode == "RGB"


def test_hidden_folders_are_no_classes_and_hold_no_images(tmp_path: Path) -> None:
    two_classes(tmp_path)
    put(tmp_path / ".ipynb_checkpoints" / "0-checkpoint.png")
    put(tmp_path / "a" / ".ipynb_checkpoints" / "0-checkpoint.png")
    put(tmp_path / "__MACOSX" / "a" / "._0.png")
    put(tmp_path / "b" / "._0.png")
    (tmp_path / ".DS_Store").touch()
    found = read_folder(tmp_path)
    assert found.classes == ("a", "b")
    assert [path.name for path, _ in found.samples] == ["0.png", "1.png"] * 2
    assert found.remarks == ()


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    two_classes(tmp_path)
    for name in ("0.heic", "1.heic", "labels.txt"):
        (tmp_path / "a" / name).touch()
    assert open_data(tmp_path, 3).remarks == (
        f"{tmp_path}: 3 files are no images that can be read, and were left out: 2 .heic, 1 .txt",
    )


@pytest.mark.parametrize(("inside", "text"), [([], "has no images:"), (["x.heic"], "has no images, only 1 .heic:")])
@pytest.mark.parametrize("split", [False, True])
def test_a_class_without_images_is_named(tmp_path: Path, inside: list[str], text: str, split: bool) -> None:
    root = tmp_path / "data"
    for part in (root / "train", root / "val") if split else (root,):
        two_classes(part)
        (part / "empty").mkdir()
        for name in inside:
            (part / "empty" / name).touch()
    with pytest.raises(RevifyError, match=f"empty {text}"):
        open_data(root, 3)


def test_the_class_is_the_first_folder_and_images_may_lie_deeper(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / name / "left" / "10.png")
        put(tmp_path / name / "left" / "9.png")
        put(tmp_path / name / "right" / "9.png")
    found = read_folder(tmp_path)
    assert found.classes == ("a", "b")
    assert [str(path.relative_to(tmp_path)) for path, target in found.samples if target == 0] == [
        "a/left/9.png",
        "a/left/10.png",
        "a/right/9.png",
    ]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    two_classes(tmp_path / "data")
    put(tmp_path / "elsewhere" / "7.png")
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "circle").symlink_to(tmp_path / "data" / "a")
    assert [path.name for path, target in read_folder(tmp_path / "data").samples if target == 0] == [
        "0.png",
        "1.png",
        "7.png",
    ]
