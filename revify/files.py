"""What lies in a checkpoint: one safetensors file, and beside it one with fitted predictors where there are such.

    vit.safetensors                             weights under the plain model's names; in the metadata format, format_version,
                                                revify_version, plan, architecture and, where there are predictors,
                                                predictors: the name and the SHA-256 of the other file
    vit.predictors-0f3a9c….safetensors          predictors under names that timm never sees

Whoever reads a file believes none of it: the metadata are data that are checked, shapes are compared before values are read,
and nothing that the file names is imported, called or fetched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from safetensors.torch import save_file
from torch import Tensor

from revify._version import __version__
from revify.couplings.formulas import Formula
from revify.errors import CheckpointError, RevifyError
from revify.moulds import check_architecture
from revify.plans import Plan
from revify.records import parse, read, shown
from revify.writing import replacing

FORMAT = "revify"
FORMAT_VERSION = 1
PREDICTORS_FORMAT = "revify predictors 1"
_DIGITS = 16  # of the hash, in the name of the predictors' file
_SIDECAR = re.compile(r"[^/\\\0]+\.predictors-[0-9a-f]{16}\.safetensors")

# By what safetensors calls them: types between which values are converted on loading, and no others
_KINDS = {
    **dict.fromkeys(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"), "floats"),
    **dict.fromkeys(("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"), "whole numbers"),
    "BOOL": "truth values",
    "C64": "complex numbers",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file, before it is read.

    Args:
        shape: of it.
        kind: "floats", "whole numbers", "truth values", "complex numbers", or safetensors' own word for another type.
    """

    shape: tuple[int, ...]
    kind: str

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        number = 1
        for size in self.shape:
            number *= size
        return number


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The file of the predictors.

    Args:
        file: its name, in the folder of the other file.
        sha256: of its bytes, in hexadecimal digits.
    """

    file: str
    sha256: str

    def faults(self) -> Iterator[str]:
        """What does not go together, in sentences."""
        if not _SIDECAR.fullmatch(self.file):
            yield "the file of the predictors is to have a name like vit.predictors-0123456789abcdef.safetensors"
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            yield "the hash of the predictors has 64 hexadecimal digits"


@dataclass(frozen=True, slots=True)
class File:
    """A checkpoint whose metadata are read and checked, and whose tensors are not read yet.

    Args:
        path: of it.
        plan: what was done to the model.
        architecture: how timm makes the plain model, None where the file does not say.
        entries: the tensors of the file and of that of the predictors, by name.
        sidecar: the latter.
    """

    path: Path
    plan: Plan
    architecture: dict[str, Any] | None
    entries: dict[str, Entry]
    sidecar: Sidecar | None

    def tensors(self) -> dict[str, Tensor]:
        """All of them, read now.

        Raises:
            CheckpointError: the file changed since it was opened, or its predictors are not those it was saved with.
        """
        paths = [self.path]
        if self.sidecar:
            paths.append(self.path.with_name(self.sidecar.file))
            if _digest(paths[1]) != self.sidecar.sha256:
                raise CheckpointError(
                    f"load({self.path}): the predictors in {self.sidecar.file} are not those that were saved with it. Bring "
                    "the file that was written together with it."
                )
        found: dict[str, Tensor] = {}
        for path in paths:
            with _telling(self.path), safe_open(path, framework="pt") as handle:
                found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # no mapping
        return found


def write(
    path: Path,
    tensors: dict[str, Tensor],
    predictors: dict[str, Tensor],
    plan: Plan,
    architecture: str,
) -> None:
    """Write a checkpoint; the predictors first, under a name of their own, so that an older file keeps its own ones.

    Args:
        path: of the file.
        tensors: what the plain model has.
        predictors: what was fitted, if anything was.
        plan: what was done to the model.
        architecture: JSON, "null" where nothing is known.

    Raises:
        OSError, SafetensorError: the disk refuses.
    """
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "revify_version": __version__,
        "plan": plan.to_json(),
        "architecture": architecture,
    }
    if predictors:
        sidecar = _write_predictors(path, predictors)
        metadata["predictors"] = json.dumps({"file": sidecar.file, "sha256": sidecar.sha256})
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def _write_predictors(path: Path, predictors: dict[str, Tensor]) -> Sidecar:
    """The file's name holds its hash: files of other predictors do not get in each other's way."""
    data = serialized(predictors, {"format": PREDICTORS_FORMAT})  # the order of more entries would be random
    digest = hashlib.sha256(data).hexdigest()
    sidecar = Sidecar(f"{path.stem}.predictors-{digest[:_DIGITS]}.safetensors", digest)
    with replacing(path.with_name(sidecar.file)) as temporary:
        temporary.write_bytes(data)
    return sidecar


def open_file(path: Path, couplings: Iterable[Formula] = ()) -> File:
    """Read and check everything about a checkpoint but its tensors.

    Args:
        path: of the file.
        couplings: formulas of your own that the plan may name.

    Raises:
        CheckpointError: the file is missing, truncated, foreign, of a newer format, or damaged.
    """
    metadata, entries = _header(path, path)
    _check_format(path, metadata)
    try:
        plan = Plan.from_json(metadata["plan"], couplings)
        stored = parse(metadata["architecture"])
        architecture = None if stored is None else check_architecture(stored)
        sidecar: Sidecar | None = None
        if "predictors" in metadata:
            sidecar = read(Sidecar, parse(metadata["predictors"]), "predictors")
    except (RevifyError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"load({path}): the file's metadata is damaged: {type(error).__name__}: {error} The weights "
            "may be whole: safetensors.torch.load_file reads them into the plain model."
        ) from error
    if sidecar is not None:
        entries = entries | _predictor_entries(path, sidecar, entries)
    return File(path, plan, architecture, entries, sidecar)


def _predictor_entries(path: Path, sidecar: Sidecar, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    beside = path.with_name(sidecar.file)
    if not beside.exists():
        raise CheckpointError(
            f"load({path}): its fitted predictors are in {sidecar.file}, which does not lie beside it. Bring both files, or "
            "read the weights into the plain model (timm.create_model(..., checkpoint_path=file)) and calibrate again."
        )
    metadata, found = _header(beside, path)
    if metadata.get("format") != PREDICTORS_FORMAT or not found.keys().isdisjoint(entries):
        raise CheckpointError(
            f"load({path}): {sidecar.file} holds no predictors. Bring the file that was written together with it."
        )
    return found


def _header(path: Path, told: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the shapes in a safetensors file; `told` is the one that was asked for."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"load({told}): the file cannot be read: {path.name} is no ordinary file.")
    with _telling(told), safe_open(path, framework="pt") as handle:
        metadata: dict[str, str] = handle.metadata() or {}
        entries: dict[str, Entry] = {}
        for name in handle.keys():  # noqa: SIM118  # no mapping
            stored = handle.get_slice(name)
            kind = str(stored.get_dtype())
            entries[name] = Entry(tuple(stored.get_shape()), _KINDS.get(kind, kind))
    return metadata, entries


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """What reading can end in, in words."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"load({path}): there is no such file.") from error
    except OSError as error:
        raise CheckpointError(f"load({path}): the file cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"load({path}): this is not a whole safetensors file ({error}). It is truncated, damaged or of "
            "another format; revify.load reads what revify.save wrote."
        ) from error


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"load({path}): a safetensors file, but not a revify checkpoint. Plain weights go into the "
            "plain model (timm.create_model(..., checkpoint_path=file)), which is then converted."
        )
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"load({path}): the file has format version {shown(version)}, written by revify "
            f"{_version(metadata)}; this "
            f"revify reads version {FORMAT_VERSION}. Install the version that wrote it."
        )


def _version(metadata: Mapping[str, str]) -> str:
    found = metadata.get("revify_version", "unknown")
    return found if len(found) < 40 and found.isprintable() else "unknown"


def _digest(path: Path) -> str:
    with _telling(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
