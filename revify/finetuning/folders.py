"""A folder of images, a folder inside it for every class ─▶ samples in a fixed order; and what was left out, told.

    FOLDER/CLASS/…/image.png        the class is the folder directly inside; images may lie deeper

Hidden files and folders (.ipynb_checkpoints, .DS_Store) are nobody's images. Whatever else is no image is counted.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from timm.utils.misc import natural_key

from revify.errors import RevifyError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_JUNK = ("__MACOSX",)


@dataclass(frozen=True, slots=True)
class Folder:
    """Images by class.

    Args:
        samples: paths with the number of their class, sorted by name.
        classes: their names, sorted, numbers in them by size.
        remarks: what was left out, in sentences.
    """

    samples: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]
    remarks: tuple[str, ...]


def read_folder(folder: Path) -> Folder:
    """Find the images of a folder.

    Raises:
        RevifyError: there are none, some are in no class folder, a class has none, or the disk refuses.
    """
    try:
        entries = sorted((entry for entry in folder.iterdir() if not _hidden(entry.name)), key=_key)
        homes = [entry for entry in entries if entry.is_dir()]
        found = {home.name: _files(home) for home in homes}
    except OSError as error:
        raise RevifyError(f"the data folder {folder} cannot be read: {error.strerror}.") from error
    stray = [entry for entry in entries if _is_image(entry) and not entry.is_dir()]
    if stray:
        raise RevifyError(
            f"{folder} has images that are in no class folder ({stray[0].name}): expected {folder}/CLASS/image.png."
        )
    if not any(map(_is_image, (path for files in found.values() for path in files))):
        raise RevifyError(f"{folder} has no images: expected {folder}/CLASS/image.png (or {', '.join(ENDINGS[1:])}).")
    for name, files in found.items():
        if not any(map(_is_image, files)):
            others = f", only {_listed(files)}" if files else ""
            raise RevifyError(
                f"the class folder {folder / name} has no images{others}: add some, or remove the folder. Images end in "
                f"{', '.join(ENDINGS)}."
            )
    samples = [(path, number) for number, files in enumerate(found.values()) for path in files if _is_image(path)]
    left = [path for files in found.values() for path in files if not _is_image(path)]
    remarks = (f"{folder}: {len(left)} files are no images that can be read, and were left out: {_listed(left)}",)
    return Folder(tuple(sorted(samples, key=lambda sample: _key(sample[0]))), tuple(found), remarks if left else ())


def _files(home: Path) -> list[Path]:
    """All files under a class folder but hidden ones, linked folders included, each folder once."""
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(home, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [name for name in folders if not _hidden(name)]
        if real not in seen:
            found += [Path(root) / name for name in names if not _hidden(name)]
        seen.add(real)
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _JUNK


def _key(path: Path) -> list[int | str]:
    """timm's order: numbers in names by their size."""
    key: list[int | str] = natural_key(str(path))
    return key


def _listed(files: list[Path]) -> str:
    """How many files there are of each ending."""
    counts = Counter(path.suffix.lower() or "without an ending" for path in files)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(4))
