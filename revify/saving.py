"""A converted model ↔ one safetensors file: weights under the plain model's names, the plan in the metadata.

The metadata is text: `format` and `format_version`, the revify version that wrote the file, the plan and, if
given, the architecture, both as JSON. Nothing is pickled and nothing in the file is run. Because the names
are the plain model's, timm reads the same file: `timm.create_model(name, checkpoint_path=file)`.

What was fitted for a calibrated model lies beside it, in a second safetensors file whose name and hash the first one holds;
see files.py.

Tensors that share memory (tied weights) are written once per name: safetensors has no shared storage, and a
plain strict `load_state_dict` needs every name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from revify.couplings.formulas import Formula
from revify.errors import CheckpointError, RevifyError
from revify.files import File, open_file, write
from revify.moulds import Bounds, TooLargeError, build, check_architecture, check_sizes
from revify.plans import Plan
from revify.reading.copying import copy_tree
from revify.reading.tracing import meta_copy
from revify.records import FaultError, printable, shown
from revify.rewriting.applying import apply_plan
from revify.runtime.predictors import PREFIX


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
    described = _architecture_to_json(architecture)
    tensors = _separate(model)
    fitted = set() if plan.is_split else {name for name in tensors if name.rpartition(".")[2].startswith(PREFIX)}
    try:
        write(
            Path(path),
            {name: value for name, value in tensors.items() if name not in fitted},
            {name: tensors[name] for name in fitted},
            plan,
            described,
        )
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"save({path}): the file could not be written and nothing was changed: {error}"
        ) from error


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, couplings: Iterable[Formula] = ()
) -> nn.Module:
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
        couplings: formulas of your own that the model was converted with (streams="split"). A file names them only, and
            nothing that a file names is imported.

    Returns:
        The converted model.

    Raises:
        CheckpointError: the file is missing, truncated, foreign, of a newer format, or does not fit the model.
    """
    file = open_file(Path(path), couplings)
    if model is not None and "revify_plan" in vars(model):
        raise CheckpointError(
            f"load({file.path}): the given {type(model).__name__} is already converted, but the file brings "
            "its own plan. Give the plain model: revify.revert(model)."
        )
    empty = _created(file, "meta") if model is None else meta_copy(model)
    _fit(file, _converted(file, empty))  # before anything is allocated
    mould = _created(file, "cpu") if model is None else copy_tree(model, {}, Tensor.detach)
    converted = _converted(file, mould)
    converted.load_state_dict(file.tensors())
    return converted


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


def _architecture_to_json(architecture: Mapping[str, Any] | None) -> str:
    if architecture is None:
        return "null"
    try:
        text = json.dumps({"name": architecture["name"], "kwargs": dict(architecture.get("kwargs", {}))})
        check_architecture(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"save: the architecture {architecture!r} cannot be stored: {type(error).__name__}: {error}. "
            "Give {'name': a timm model, 'kwargs': arguments of timm.create_model that JSON can hold}, or "
            "None."
        ) from error
    return text


# Reading


def _converted(file: File, mould: nn.Module) -> nn.Module:
    """The mould after the stored plan."""
    try:
        return apply_plan(mould, file.plan)
    except RevifyError as error:
        raise CheckpointError(
            f"load({file.path}): the stored plan was made for {file.plan.model} and does not fit this "
            f"{type(mould).__name__}: {error} Give a model of the architecture that was saved."
        ) from error


def _created(file: File, device: str) -> nn.Module:
    """The stored architecture, as timm makes it."""
    if file.architecture is None:
        name = file.plan.architecture or file.plan.model
        raise CheckpointError(
            f"load({file.path}): the file does not say how to create its {file.plan.model}. Give a plain "
            f"model: revify.load(file, timm.create_model({name!r}, ...)), or save with architecture=."
        )
    name, kwargs = file.architecture["name"], file.architecture["kwargs"]
    try:
        check_sizes(kwargs, _bounds(file))
        return build(name, kwargs, device, _bounds(file))
    except (FaultError, TooLargeError) as error:
        raise CheckpointError(
            f"load({file.path}): the stored architecture {name!r} does not fit the stored tensors: {error}. The file is "
            "damaged; if you trust it, give a plain model of it to revify.load."
        ) from error
    except Exception as error:  # whatever a timm constructor does with arguments from the file
        raise CheckpointError(
            f"load({file.path}): timm cannot create the stored architecture {name!r} with "
            f"{shown(kwargs)}: {type(error).__name__}: {printable(str(error))}. Give a plain model of it to revify.load."
        ) from error


def _bounds(file: File) -> Bounds:
    dimensions = [size for shape in (*(e.shape for e in file.entries.values()), *file.plan.example) for size in shape]
    return Bounds(
        tensors=len(file.entries),
        elements=sum(entry.elements for entry in file.entries.values()),
        largest=max(dimensions, default=0),
    )


def _fit(file: File, model: nn.Module) -> None:
    """Refuse the file unless it fills `model` exactly."""
    expected = model.state_dict()
    stored = file.entries
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor) and name in stored}
    shapes = [
        f"{name} {stored[name].shape} in the file, {tuple(value.shape)} in the model"
        for name, value in tensors.items()
        if stored[name].shape != tuple(value.shape)
    ]
    kinds = [
        f"{name} {stored[name].kind} in the file, {_kind(value)} in the model"
        for name, value in tensors.items()
        if stored[name].kind != _kind(value)
    ]
    differences = (
        _some("missing in the file", [name for name in expected if name not in stored])
        + _some("not in the model", [name for name in stored if name not in expected])
        + _some("of another shape", shapes)
        + _some("of another type", kinds)
    )
    if differences:
        raise CheckpointError(
            f"load({file.path}): the file does not fit this {type(model).__name__}: "
            f"{'; '.join(differences)}. Create the model as it was when saved (num_classes, img_size, ...). "
            "Nothing was changed."
        )


def _kind(value: Tensor) -> str:
    """The kind of a tensor's values, as files.Entry has it."""
    if value.is_floating_point():
        return "floats"
    if value.is_complex():
        return "complex numbers"
    return "truth values" if value.dtype == torch.bool else "whole numbers"


def _some(what: str, names: Iterable[str]) -> list[str]:
    found = list(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"{len(found)} {what}: {', '.join(map(printable, found[:3]))}{more}"] if found else []
