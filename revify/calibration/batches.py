"""Calibration data → batches that a model can be called with, and what counts of its output.

a tensor [n, …]            parted into batches of 32
a dictionary of tensors    one batch, by keyword: what the model's forward does not know (labels) is left out
an iterable of these       a DataLoader; of a tuple or list the first element is the input
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revify.errors import RevifyError

CHUNK = 32  # samples that run at a time

Data = Tensor | Mapping[str, Any] | Iterable[Any]  # Any: batches are of every type
Signature = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model is called with.

    Args:
        args: its input by position, or nothing.
        kwargs: its inputs by keyword, or nothing.
    """

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors."""
        return (*self.args, *(value for value in self.kwargs.values() if isinstance(value, Tensor)))

    @property
    def size(self) -> int:
        """How many samples it has."""
        return len(self.tensors[0])

    @property
    def signature(self) -> Signature:
        """The shapes of one sample: batches with the same give streams of the same shape."""
        return tuple(tuple(x.shape[1:]) for x in self.tensors)

    def part(self, start: int, stop: int) -> Batch:
        """Some of its samples."""
        size = self.size

        def cut(value: Any) -> Any:
            return value[start:stop] if isinstance(value, Tensor) and value.dim() and len(value) == size else value

        return Batch(tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()})

    @property
    def example(self) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """Two of its samples, as `plan` takes them."""
        few = self.part(0, 2)
        return few.args or {name: value for name, value in few.kwargs.items() if isinstance(value, Tensor)}


def batches_of(model: nn.Module, data: Data | list[Batch]) -> list[Batch]:
    """Batches of at most 32 samples, where the model's first parameter is, in its type where that is a short one.

    Raises:
        RevifyError: there are no data, or they are no tensors.
    """
    like = next(model.parameters(), torch.empty(0))
    found: list[Batch] = []
    for batch in [data] if isinstance(data, Tensor | Mapping) else data:
        whole = batch if isinstance(batch, Batch) else _batch(model, batch)
        placed = Batch(
            tuple(_placed(x, like) for x in whole.args), {k: _placed(v, like) for k, v in whole.kwargs.items()}
        )
        found += [placed.part(start, start + CHUNK) for start in range(0, placed.size, CHUNK)]
    if not found:
        raise RevifyError("calibration data: there is no batch in them. Give at least one, some 32 to 256 images.")
    return found


def main_output(value: Any) -> Tensor:
    """The tensor that counts of what a model returns: the first of floats with a batch axis, in whatever it lies.

    Raises:
        RevifyError: there is none.
    """
    for tensor in _tensors_in(value):
        if tensor.is_floating_point() and tensor.dim() > 0:
            return tensor
    raise RevifyError(
        f"calibration: the model returns {type(value).__name__} without a tensor of floats, so nothing says how near another "
        "output is to it. Wrap the model into one that returns its main output."
    )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for part in value.values() for tensor in _tensors_in(part))
    elif isinstance(value, tuple | list):
        yield from (tensor for part in value for tensor in _tensors_in(part))
    elif dataclasses.is_dataclass(value):
        yield from (tensor for f in dataclasses.fields(value) for tensor in _tensors_in(getattr(value, f.name)))


def _batch(model: nn.Module, batch: Any) -> Batch:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(x, Tensor) and x.dim() > 0:
        return Batch((x,), {})
    if isinstance(x, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = {p.name for p in parameters}
        given = {name: value for name, value in x.items() if everything or name in known}
        if any(isinstance(value, Tensor) and value.dim() > 0 for value in given.values()):
            return Batch((), given)
        raise RevifyError(
            f"calibration data: a batch has {', '.join(map(str, x)) or 'nothing'}, but {type(model).__name__}.forward takes "
            f"{', '.join(p.name for p in parameters)}: name the inputs as the model does."
        )
    raise RevifyError(
        f"calibration data: expected batches of tensors or dictionaries of tensors, got {type(x).__name__}."
    )


def _placed(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    short = like.dtype in (torch.float16, torch.bfloat16) and value.is_floating_point()
    return value.to(like.device, like.dtype) if short else value.to(like.device)
