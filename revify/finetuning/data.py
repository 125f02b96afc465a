"""A folder of images, or the digits that ship with scikit-learn → images to train and to validate on."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from revify.errors import RevifyError
from revify.finetuning.folders import read_folder
from revify.finetuning.recipe import Recipe

DIGITS = "digits"
_VALIDATION_SHARE = 0.2
_MOST_WORKERS = 4  # that are taken unasked
_SPLIT_SEED = 0  # part of what the split is: the same in every run
_TRAIN_NAMES = ("train", "training")
_VALIDATION_NAMES = ("val", "validation", "valid")

Sample = tuple[Path | Image.Image, int]


@dataclass
class Images(Dataset[tuple[Tensor, int]]):
    """Images with their classes; timm's loader sets the transform.

    timm's own dataset puts the next image in the place of one that cannot be read. Here that is an error.
    """

    samples: Sequence[Sample]
    mode: str = "RGB"
    transform: Callable[[Image.Image], Tensor] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, target = self.samples[index]
        if self.transform is None:
            raise RevifyError("these images have no transform yet: make a loader of them first.")
        return self.transform(self._open(source)), target

    def _open(self, source: Path | Image.Image) -> Image.Image:
        if isinstance(source, Image.Image):
            return source.convert(self.mode)
        try:
            with Image.open(source) as image:
                return _with_eight_bits(image).convert(self.mode)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:  # PIL raises all of these
            raise RevifyError(f"the image {source} cannot be read ({error}): repair or remove it.") from error


def _with_eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits a pixel with 8; PIL itself would cut off what is above 255.

    Raises:
        ValueError: 32 bits, which can mean anything.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # as older PILs read it
        return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel, and no range that says what is white; save it with 8 or 16 bits")
    return image


@dataclass(frozen=True, slots=True)
class ImageData:
    """Two sets of images with the same classes.

    Args:
        name: for messages.
        train: images to train on.
        validation: images to judge by.
        classes: names in the order of their numbers.
        hflip: probability of a mirror image that suits them: .5, or 0 where a mirror image is something else.
        crop_pct: share of the image that validation looks at; None is the model's own.
        remarks: what the user should know about them, such as files that were left out.
    """

    name: str
    train: Images
    validation: Images
    classes: tuple[str, ...]
    hflip: float = 0.5
    crop_pct: float | None = None
    remarks: tuple[str, ...] = ()


def open_data(source: str | Path, channels: int) -> ImageData:
    """Find the images to train and to validate on.

    Args:
        source: "digits", a folder with `train` and `val` inside, each with a folder for every class, or one
            folder of classes, of which a fixed fifth, stratified, is for validation; see folders.py.
        channels: of the model's input: 3, or 1 for grey images.

    Returns:
        The data.

    Raises:
        RevifyError: no such folder, no images, one class only, or classes that differ between the two sets.
    """
    if channels not in (1, 3):
        raise RevifyError(f"the model takes {channels} channels; images have 3, or 1 (--model-kwargs in_chans=1).")
    mode = "RGB" if channels == 3 else "L"
    if str(source) == DIGITS:
        return _digits(mode)
    root = Path(source)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise RevifyError(f'the data folder {root} {what}: give a folder of images by class, or "{DIGITS}".')
    train, validation = _subfolder(root, _TRAIN_NAMES), _subfolder(root, _VALIDATION_NAMES)
    if train and validation:
        found, others = read_folder(train), read_folder(validation)
        samples: list[Sample] = list(found.samples)
        held_out: list[Sample] = list(others.samples)
        _check_classes(train, found.classes, validation, others.classes)
        remarks = found.remarks + others.remarks
    elif train:
        raise RevifyError(f"{root} has {train.name}/ but no val/: add it, or give {train} to have a fifth split off.")
    else:
        found = read_folder(root)
        samples, held_out = _split(found.samples, found.classes, root)
        remarks = found.remarks
    if len(found.classes) < 2:
        raise RevifyError(
            f"{root} has one class only ({found.classes[0]}), so there is nothing to learn: add a folder per class."
        )
    return ImageData(str(root), Images(samples, mode), Images(held_out, mode), found.classes, remarks=remarks)


def make_loaders(
    data: ImageData, recipe: Recipe, model: Any, input_size: tuple[int, int, int]
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """timm's loaders over the data: for training, shuffled and augmented, and for validation.

    Args:
        data: the images.
        recipe: batch size, augmentation and workers.
        model: its timm configuration says how pixels are normalised and interpolated.
        input_size: channels, height and width.

    Raises:
        RevifyError: fewer images than one batch, or an augmentation that timm does not know.
    """
    if len(data.train) < recipe.batch_size:
        raise RevifyError(
            f"{data.name} has {len(data.train)} images to train on, fewer than one batch of "
            f"{recipe.batch_size}: lower the batch size."
        )
    config = timm.data.resolve_data_config({"input_size": input_size}, model=model)
    if input_size[0] == 1:
        config["mean"], config["std"] = config["mean"][:1], config["std"][:1]
    shared = {
        **config,
        "crop_pct": recipe.crop_pct or data.crop_pct or config["crop_pct"],
        "use_prefetcher": False,  # it is for CUDA; Accelerate moves the batches
        "num_workers": _workers(recipe, data),
        "persistent_workers": False,  # their random numbers would not survive a resume
        "pin_memory": torch.cuda.is_available(),
        "device": torch.device("cpu"),
    }
    try:
        train = timm.data.create_loader(
            data.train,
            batch_size=recipe.batch_size,
            is_training=True,
            scale=recipe.scale,
            ratio=(3 / 4, 4 / 3),
            hflip=data.hflip if recipe.hflip is None else recipe.hflip,
            color_jitter=recipe.color_jitter or None,
            auto_augment=recipe.auto_augment,
            re_prob=recipe.reprob,
            **shared,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise RevifyError(f"timm refuses this augmentation (auto_augment={recipe.auto_augment!r}): {error}") from error
    return train, timm.data.create_loader(data.validation, batch_size=recipe.batch_size, **shared)


def _workers(recipe: Recipe, data: ImageData) -> int:
    if recipe.workers is not None:
        return recipe.workers
    return 0 if data.name == DIGITS else min(_MOST_WORKERS, os.cpu_count() or 1)


def _digits(mode: str) -> ImageData:
    """1797 handwritten digits of 8×8 pixels, in 17 grey levels (Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).round().astype("uint8")) for image in bunch.images]
    samples: list[Sample] = list(zip(pictures, map(int, bunch.target), strict=True))
    classes = tuple(str(name) for name in bunch.target_names)
    train, validation = _split(samples, classes, Path(DIGITS))
    return ImageData(DIGITS, Images(train, mode), Images(validation, mode), classes, hflip=0.0, crop_pct=1.0)


def _subfolder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _check_classes(train: Path, classes: tuple[str, ...], validation: Path, others: tuple[str, ...]) -> None:
    if classes == others:
        return
    only = [
        f"only in {folder}: {', '.join(sorted(set(own) - set(other))[:5])}"
        for folder, own, other in ((train, classes, others), (validation, others, classes))
        if set(own) - set(other)
    ]
    raise RevifyError(f"the classes differ, so their numbers would not mean the same; {'; '.join(only)}.")


def _split(samples: Sequence[Sample], classes: tuple[str, ...], root: Path) -> tuple[list[Sample], list[Sample]]:
    """A fixed fifth of every class, at least one image, for validation."""
    train: list[Sample] = []
    validation: list[Sample] = []
    for number, name in enumerate(classes):
        members = [sample for sample in samples if sample[1] == number]
        if len(members) < 2:
            raise RevifyError(f"{root}: class {name} has one image only, which cannot be split: add images of it.")
        random.Random(_SPLIT_SEED).shuffle(members)
        count = max(1, round(len(members) * _VALIDATION_SHARE))
        validation += members[:count]
        train += members[count:]
    return train, validation
