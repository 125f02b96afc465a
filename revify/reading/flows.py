"""Module → how large the values are that flow through its blocks, and how much each block changes them: a run with data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revify.reading.programs import Part, Program, read_program
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


Where = tuple[str, int | None, int]  # the path of a block; or of a container, which of its runs, and which step of it


def watch_flows(
    model: nn.Module,
    example: Example,
    places: Mapping[str, Place],
    runs: Mapping[str, Collection[int | str]],
    *,
    training: bool = True,
) -> dict[Where, Flow]:
    """Run a copy of the model, with its own parameters, and look at its blocks.

    An input without data, or that is the same everywhere (only shapes were meant), is replaced by normal random numbers.

    Args:
        model: with data; it stays as it is, and so do the random numbers.
        example: its inputs.
        places: the blocks to look at, by path.
        runs: containers whose steps are to be looked at, with those of their arguments that are tensors.
        training: whether in train or in eval mode.

    Returns:
        The flow of each block, or step of a container, that was called.
    """
    found: dict[Where, tuple[Tensor, ...]] = {}
    device = device_of(model)
    copied = copy_with_data(model).train(training)
    for path, place in places.items():
        copied.get_submodule(path).register_forward_hook(partial(_look, found, path, place), with_kwargs=True)
    for path, given in runs.items():
        container = copied.get_submodule(path)
        program = read_program(container, given)
        if program is not None:
            container.forward = _Watched(found, path, container, program)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        call_with(copied, with_data(example, device))
    return {where: Flow(*(float(number) for number in numbers)) for where, numbers in found.items()}


class _Watched:
    """Stands in for the forward of a container: runs its program and looks at its steps."""

    def __init__(
        self, found: dict[Where, tuple[Tensor, ...]], path: str, container: nn.Module, program: Program
    ) -> None:
        self.found, self.path, self.container, self.program = found, path, container, program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seen = Counter[int]()

        def step(number: int, part: Part, z: Any, side: tuple[Any, ...]) -> Any:
            following = part(self.container, z, *side)
            if isinstance(z, Tensor) and z.shape == following.shape:
                self.found[self.path, part.run, seen[part.run]] = _numbers(z, following)
            seen[part.run] += 1
            return following

        return self.program(self.container, args, kwargs, step)


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
    found: dict[Where, tuple[Tensor, ...]],
    path: str,
    place: Place,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    x = args[place.stream] if isinstance(place.stream, int) else kwargs[place.stream]
    y = output if place.result is None else output[place.result]
    found[path, None, 0] = _numbers(x, y)


def _numbers(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """A flow's numbers, on the device."""
    wide = torch.promote_types(y.dtype, torch.float32)
    x, y = x.to(wide), y.to(wide)
    peak = torch.maximum(x.abs().amax(), y.abs().amax())
    return peak, y.square().mean().sqrt(), (y - x).square().mean().sqrt()


def _with_data(x: Tensor, device: torch.device) -> Tensor:
    """The same input, with numbers in it."""
    if x.is_floating_point() and (x.is_meta or x.numel() == 0 or bool((x == x.flatten()[0]).all())):
        return torch.randn(x.shape, device=device).to(x.dtype)
    return torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x.detach().to(device)
