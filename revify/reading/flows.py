"""Module → how large the values are that flow through its blocks, and how much each block changes them: a run with data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revify.reading.tracing import Example, call_with, copy_with_data, each_of


@dataclass(frozen=True, slots=True)
class Flow:
    """What one block was given and gave.

    Args:
        peak: the largest magnitude in its input and output.
        size: root mean square of its output.
        change: root mean square of output − input.
    """

    peak: float
    size: float
    change: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where the stream is in a block's call: among the arguments, and among several results (None where it is alone)."""

    stream: int | str
    result: int | None


def watch_flows(
    model: nn.Module, example: Example, places: Mapping[str, Place], *, training: bool = True
) -> dict[str, Flow]:
    """Run a copy of the model, with its own parameters, and look at its blocks.

    An input without data, or that is the same everywhere (only shapes were meant), is replaced by normal random numbers.

    Args:
        model: with data; it stays as it is, and so do the random numbers.
        example: its inputs.
        places: the blocks to look at, by path.
        training: whether in train or in eval mode.

    Returns:
        The flow of each block that was called.
    """
    found: dict[str, tuple[Tensor, ...]] = {}
    device = device_of(model)
    copied = copy_with_data(model).train(training)
    for path, place in places.items():
        copied.get_submodule(path).register_forward_hook(partial(_look, found, path, place), with_kwargs=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        call_with(copied, with_data(example, device))
    return {path: Flow(*(float(number) for number in numbers)) for path, numbers in found.items()}


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def holds_data(model: nn.Module) -> bool:
    """Whether it can run for real."""
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def with_data(example: Example, device: torch.device) -> Example:
    """The same inputs with numbers in them: normal random ones where there were none, or the same everywhere."""
    return each_of(example, partial(_with_data, device=device))


def _look(
    found: dict[str, tuple[Tensor, ...]],
    path: str,
    place: Place,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    x = args[place.stream] if isinstance(place.stream, int) else kwargs[place.stream]
    y = output if place.result is None else output[place.result]
    wide = torch.promote_types(y.dtype, torch.float32)
    x, y = x.to(wide), y.to(wide)
    peak = torch.maximum(x.abs().amax(), y.abs().amax())
    found[path] = (peak, y.square().mean().sqrt(), (y - x).square().mean().sqrt())


def _with_data(x: Tensor, device: torch.device) -> Tensor:
    """The same input, with numbers in it."""
    if x.is_floating_point() and (x.is_meta or x.numel() == 0 or bool((x == x.flatten()[0]).all())):
        return torch.randn(x.shape, device=device).to(x.dtype)
    return torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x.detach().to(device)
