"""A converted model ↔ one safetensors file: weights under the plain model's names, the plan in the metadata.

The metadata is text: `format` and `format_version`, the revify version that wrote the file, the plan and, if
given, the architecture, both as JSON. Nothing is pickled and nothing in the file is run. Because the names
are the plain model's, timm reads the same file: `timm.create_model(name, checkpoint_path=file)`.

A calibrated model's file also holds what was fitted, under names of its own; its plain weights are those of
`revify.revert(revify.load(file))`.

Tensors that share memory (tied weights) are written once per name: safetensors has no shared storage, and a
plain strict `load_state_dict` needs every name.
"""

from __future__ import annotations

import copy
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from revify._version import __version__
from revify.errors import CheckpointError, RevifyError
from revify.plans import Plan
from revify.rewriting.applying import apply_plan

FORMAT = "revify"
FORMAT_VERSION = 1
_FETCHING = frozenset({"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"})


def save(model: nn.Module, path: str | os.PathLike[str], architecture: Mapping[str, Any] | None = None) -> None:
    """Write a converted model to one safetensors file.

    The file appears whole or not at all: it is written beside `path` under another name, flushed to the disk and then
    renamed. An older file at `path` survives every failure. In a run of several processes call it from one of them.

    Example:
        >>> import tempfile, timm, revify
        >>> model = revify.convert(timm.create_model("test_vit", num_classes=10))
        >>> file = tempfile.mkdtemp() + "/vit.safetensors"
        >>> revify.save(model, file, {"name": "test_vit", "kwargs": {"num_classes": 10}})
        >>> revify.load(file).revify_plan == model.revify_plan
        True
        >>> plain = timm.create_model("test_vit", num_classes=10, checkpoint_path=file)

    Args:
        model: a converted model, not wrapped (DDP, torch.compile).
        path: the file to write; timm recognises the format by the ending `.safetensors`.
        architecture: how timm makes the plain model, `{"name": ..., "kwargs": {...}}` with keyword arguments
            of `timm.create_model` that JSON can hold; without it `load` must be given a plain model.

    Raises:
        CheckpointError: the model is not converted, holds no plain tensors, or the file cannot be written.
    """

    plan = vars(model).get("revify_plan")
    if not isinstance(plan, Plan):
        raise CheckpointError(
            f"save({type(model).__name__}): this is not a converted model. Convert it first, or give the "
            "model inside its wrapper (DDP: model.module; torch.compile: model._orig_mod); write a plain "
            "model with safetensors.torch.save_model."
        )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "revify_version": __version__,
        "plan": plan.to_json(),
        "architecture": _architecture_to_json(architecture),
    }
    _write(_separate(model), metadata, Path(path))


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read a converted model from a file that `save` wrote.

    The given model is only the mould: it is copied, the copy is converted by the stored plan and filled from
    the file. The model itself keeps its values and its plain forward, and shares nothing with the result.

    Example:
        >>> import tempfile, timm, revify
        >>> file = tempfile.mkdtemp() + "/vit.safetensors"
        >>> revify.save(revify.convert(timm.create_model("test_vit")), file)
        >>> model = revify.load(file, timm.create_model("test_vit"))

    Args:
        path: the file.
        model: a plain model of the same architecture, which decides device, dtype and mode of the result;
            None lets timm create it from the stored architecture, on the CPU and in training mode.

    Returns:
        The converted model.

    Raises:
        CheckpointError: the file is missing, truncated, foreign, of a newer format, or does not fit the model.
    """
    file = _read(Path(path))
    if model is not None and "revify_plan" in vars(model):
        raise CheckpointError(
            f"load({file.path}): the given {type(model).__name__} is already converted, but the file brings "
            "its own plan. Give the plain model: revify.revert(model)."
        )
    mould = _created(file) if model is None else copy.deepcopy(model)
    try:
        converted = apply_plan(mould, file.plan)
    except RevifyError as error:
        raise CheckpointError(
            f"load({file.path}): the stored plan was made for {file.plan.model} and does not fit this "
            f"{type(mould).__name__}: {error} Give a model of the architecture that was saved."
        ) from error
    _fit(file, converted)
    converted.load_state_dict(file.tensors)
    return converted


@dataclass(frozen=True, slots=True)
class _File:
    """What a checkpoint holds, parsed and checked."""

    path: Path
    plan: Plan
    architecture: dict[str, Any] | None
    tensors: dict[str, Tensor]


# Writing


def _separate(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` as contiguous tensors of which no two share memory; the model stays as it is."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if type(value) is not Tensor or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(
                f"save({type(model).__name__}): the state entry {name!r} is not an ordinary dense tensor "
                f"(but a {type(value).__name__}), and safetensors holds nothing else. Gather or materialise "
                "it first."
            )
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return {name: value.contiguous() for name, value in tensors.items()}


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as created:
            mode = os.fstat(created.fileno()).st_mode  # as the umask grants; safetensors would make it 0600
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as written:
            os.fchmod(written.fileno(), mode)
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"save({path}): the file could not be written and nothing was changed: {error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the new name itself on the disk, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _architecture_to_json(architecture: Mapping[str, Any] | None) -> str:
    if architecture is None:
        return "null"
    try:
        text = json.dumps({"name": architecture["name"], "kwargs": dict(architecture.get("kwargs", {}))})
        _check_architecture(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"save: the architecture {architecture!r} cannot be stored: {type(error).__name__}: {error}. "
            "Give {'name': a timm model, 'kwargs': arguments of timm.create_model that JSON can hold}, or "
            "None."
        ) from error
    return text


def _check_architecture(architecture: Any) -> dict[str, Any]:  # Any: it comes out of JSON
    """Only what builds a plain module: no download, no other file to open."""
    import timm  # here: importing it takes seconds

    name, kwargs = architecture["name"], architecture["kwargs"]
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]) or ":" in name:
        raise ValueError(f"{name!r} is not the name of a timm model")
    if refused := sorted(_FETCHING & set(kwargs)):
        raise ValueError(f"the argument {refused[0]!r} opens other files")
    return {"name": name, "kwargs": dict(kwargs)}


# Reading


def _read(path: Path) -> _File:
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            _check_format(path, metadata)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # no mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"load({path}): there is no such file.") from error
    except OSError as error:
        raise CheckpointError(f"load({path}): the file cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"load({path}): this is not a whole safetensors file ({error}). It is truncated, damaged or of "
            "another format; revify.load reads what revify.save wrote."
        ) from error
    try:
        plan = Plan.from_json(metadata["plan"])
        stored = json.loads(metadata["architecture"])
        architecture = None if stored is None else _check_architecture(stored)
    except (RevifyError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"load({path}): the file's metadata is damaged: {type(error).__name__}: {error}. The weights "
            "may be whole: safetensors.torch.load_file reads them into the plain model."
        ) from error
    return _File(path, plan, architecture, tensors)


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"load({path}): a safetensors file, but not a revify checkpoint. Plain weights go into the "
            "plain model (timm.create_model(..., checkpoint_path=file)), which is then converted."
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) != FORMAT_VERSION:
        writer = metadata.get("revify_version", "unknown")
        raise CheckpointError(
            f"load({path}): the file has format version {version!r}, written by revify {writer}; this "
            f"revify reads version {FORMAT_VERSION}. Install the version that wrote it."
        )


def _created(file: _File) -> nn.Module:
    import timm  # here: importing it takes seconds

    if file.architecture is None:
        name = file.plan.architecture or file.plan.model
        raise CheckpointError(
            f"load({file.path}): the file does not say how to create its {file.plan.model}. Give a plain "
            f"model: revify.load(file, timm.create_model({name!r}, ...)), or save with architecture=."
        )
    name, kwargs = file.architecture["name"], file.architecture["kwargs"]
    try:
        with torch.random.fork_rng(devices=[]):  # values that are overwritten cost no random numbers
            model: nn.Module = timm.create_model(name, **kwargs)
    except Exception as error:  # whatever a timm constructor does with arguments from the file
        raise CheckpointError(
            f"load({file.path}): timm {timm.__version__} cannot create the stored architecture {name!r} with "
            f"{kwargs}: {type(error).__name__}: {error}. Give a plain model of it to revify.load."
        ) from error
    return model


def _fit(file: _File, model: nn.Module) -> None:
    """Refuse the file unless it fills `model` exactly."""
    expected = model.state_dict()
    shapes = [
        f"{name} {tuple(file.tensors[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in expected.items()
        if name in file.tensors and file.tensors[name].shape != value.shape
    ]
    differences = (
        _some("missing in the file", [name for name in expected if name not in file.tensors])
        + _some("not in the model", [name for name in file.tensors if name not in expected])
        + _some("of another shape", shapes)
    )
    if differences:
        raise CheckpointError(
            f"load({file.path}): the file does not fit this {type(model).__name__}: "
            f"{'; '.join(differences)}. Create the model as it was when saved (num_classes, img_size, ...). "
            "Nothing was changed."
        )


def _some(what: str, names: Iterable[str]) -> list[str]:
    found = list(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"{len(found)} {what}: {', '.join(found[:3])}{more}"] if found else []
