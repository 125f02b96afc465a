"""An architecture from a file → the plain module that is to be filled, within bounds that the file's tensors set.

The file says the name of a timm model and keyword arguments of it. Both are data from somebody else: the arguments may open no
files and fetch nothing, their numbers are no larger than what is stored calls for, and building ends as soon as there are
more modules or parameters than the stored tensors can fill. The module is built without memory first (on the meta device).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from revify.records import FaultError, shown

FETCHING = frozenset(
    {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"}
)

_USUAL = 4096  # images have no more pixels to a side, layers no more channels, unless stored shapes say so
_MOST_VALUES = 4096  # in all the arguments
_LONGEST = 256
_SPARE_ELEMENTS = 2**22  # of buffers that are computed and not stored


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the tensors of a file say about the module that they fill.

    Args:
        tensors: how many there are.
        elements: of all of them.
        largest: dimension of any of them, or of the images that the plan was made with.
    """

    tensors: int
    elements: int
    largest: int


class TooLargeError(ValueError):
    """The arguments ask for more than the stored tensors fill."""


def check_architecture(architecture: Any) -> dict[str, Any]:  # Any: it comes out of JSON
    """Only what builds a plain module: no download, no other file to open.

    Raises:
        ValueError: something else.
    """
    import timm  # here: importing it takes seconds

    if not isinstance(architecture, Mapping) or set(architecture) != {"name", "kwargs"}:
        raise ValueError(f'{shown(architecture)} is not {{"name": …, "kwargs": …}}')
    name, kwargs = architecture["name"], architecture["kwargs"]
    if not isinstance(name, str) or ":" in name or "/" in name or not timm.is_model(name.split(".")[0]):
        raise ValueError(f"{shown(name)} is not the name of a timm model")
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"{shown(kwargs)} are no keyword arguments")
    if refused := sorted(FETCHING & set(kwargs)):
        raise ValueError(f"the argument {refused[0]!r} opens other files")
    if "device" in kwargs:
        raise ValueError("the argument 'device' is for whoever loads to choose")
    return {"name": name, "kwargs": dict(kwargs)}


def check_sizes(kwargs: Mapping[str, Any], bounds: Bounds) -> None:
    """Refuse arguments that no module of the stored size has.

    Raises:
        FaultError: a number or a text is too large, or there are too many of them.
    """
    largest = max(_USUAL, bounds.largest)
    pending: list[tuple[str, Any]] = list(kwargs.items())
    seen = 0
    while pending:
        name, value = pending.pop()
        seen += 1
        if isinstance(value, Mapping):
            pending += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(name, item) for item in value]
        elif isinstance(value, str):
            fits = len(value) <= _LONGEST and value.isprintable()
            _expect(fits, f"the argument {shown(name)} is no text of at most {_LONGEST} printable characters")
        elif isinstance(value, int | float):
            _expect(abs(value) <= largest, f"the argument {shown(name)} is {shown(value)}, beyond ±{largest}")
        _expect(seen <= _MOST_VALUES, f"the arguments hold more than {_MOST_VALUES} values")


def build(name: str, kwargs: Mapping[str, Any], device: str, bounds: Bounds) -> nn.Module:
    """The timm model on a device, with values that are about to be overwritten; no random numbers are drawn.

    Raises:
        TooLargeError: it has more modules, parameters or buffers than the bounds allow.
        Exception: whatever a timm constructor does with the arguments.
    """
    import timm  # here: importing it takes seconds

    with torch.random.fork_rng(devices=[]), torch.device(device), _watching(bounds):
        model: nn.Module = timm.create_model(name, **kwargs)
    return model


@contextmanager
def _watching(bounds: Bounds) -> Iterator[None]:
    """End the building of a module of this thread at the first one too many."""
    count = {"modules": 0, "tensors": 0, "elements": 0}
    most = {
        "modules": 50 * bounds.tensors + 1000,  # with dropouts, activations and containers
        "tensors": 4 * bounds.tensors + 1000,  # some are replaced while a module is built
        "elements": 2 * bounds.elements + _SPARE_ELEMENTS,  # of buffers, stored or not
    }
    here = threading.get_ident()

    def add(what: str, number: int) -> None:
        if threading.get_ident() != here:
            return
        count[what] += number
        if count[what] > most[what]:
            raise TooLargeError(f"it would have more {what} than the {bounds.tensors} stored tensors can fill")

    def buffer(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
        add("tensors", 1)
        add("elements", 0 if value is None else value.numel())

    handles = [
        register_module_module_registration_hook(lambda *_: add("modules", 1)),
        register_module_parameter_registration_hook(lambda *_: add("tensors", 1)),
        register_module_buffer_registration_hook(buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _expect(holds: bool, fault: str) -> None:
    if not holds:
        raise FaultError(fault)
