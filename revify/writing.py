"""One way to write a file: it is there whole or not at all.

    write beside it under another name ─▶ flush to the disk ─▶ rename ─▶ flush the folder

An older file of the name survives every failure. What a killed process left beside it goes with the next writing.
"""

from __future__ import annotations

import glob
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LONGEST = 100  # characters of the file's name that its temporary file repeats: file systems take 255 bytes
_HOUR = 3600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new, empty file to write to, which gets the name `path` when the block ends without an error.

    A symbolic link stays one: what it points to is replaced.

    Raises:
        OSError: the disk refuses, or `path` is there and no ordinary file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is there, and is no ordinary file")
    _sweep(path)
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as created:
            mode = stat.S_IMODE(os.fstat(created.fileno()).st_mode)  # as the umask grants
        yield temporary
        os.chmod(temporary, mode)  # safetensors makes it 0600
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # on a disk that cannot be written; what is raised says why
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OSError: the disk refuses.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def place(source: Path, target: Path) -> None:
    """Let a whole file that does not change any more be at a second place, too: as a link where that works, else a copy.

    Raises:
        OSError: the disk refuses.
    """
    if target.exists() and os.path.samefile(source, target):
        return
    _sweep(target)
    temporary = _beside(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # the file system has no links
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_all(folder: Path) -> None:
    """Put everything in a folder on the disk.

    Raises:
        OSError: the disk refuses.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as written:
                os.fsync(written.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where folders can be opened."""
    with suppress(OSError):  # the files are there and whole; only a power cut in the next seconds could undo a name
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(path: Path) -> Path:
    """A name that nobody else uses, from which `_sweep` knows what it was for and who wrote it."""
    return path.with_name(f".{path.name[:_LONGEST]}.{os.getpid()}-{uuid.uuid4().hex}.tmp")


def _sweep(path: Path) -> None:
    """Remove temporary files of this name whose writer is dead."""
    for left in path.parent.glob(f".{glob.escape(path.name[:_LONGEST])}.*.tmp"):
        with suppress(OSError):  # another process was faster, or the disk cannot be written
            if not _has_writer(left):
                left.unlink()


def _has_writer(temporary: Path) -> bool:
    """Whether the process whose number is in the name lives; nobody writes for an hour without a byte."""
    if os.name != "posix":  # there a signal of number 0 is Ctrl-C
        return True
    number = temporary.name.split(".")[-2].partition("-")[0]
    if not number.isdecimal() or time.time() - temporary.stat().st_mtime > _HOUR:
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # it lives, and is somebody else's
    return True
