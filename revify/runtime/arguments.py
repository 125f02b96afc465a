"""The stream among a block's arguments: taken out, and put in again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from revify.errors import StreamError
from revify.runtime.replay import version


def split_stream(stream: int | str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The stream among a block's arguments, and (args, kwargs) with a hole where it was.

    Raises:
        StreamError: there is no tensor at its place.
    """
    x: Any = None  # Any: a caller may pass anything
    if isinstance(stream, int) and stream < len(args):
        x = args[stream]
        args = (*args[:stream], None, *args[stream + 1 :])
    elif isinstance(stream, str) and stream in kwargs:
        x, kwargs = kwargs[stream], {**kwargs, stream: None}
    if not isinstance(x, Tensor):
        where = f"argument {stream}" if isinstance(stream, int) else f"keyword {stream!r}"
        raise StreamError(
            f"{name}: expected its stream, a tensor, as {where}, got {type(x).__name__}. Call the block as it "
            "was called when the model was converted."
        )
    return x, (args, kwargs)


def with_stream(
    stream: int | str, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another value of the stream."""
    if isinstance(stream, int):
        return (*args[:stream], z, *args[stream + 1 :]), kwargs
    return args, {**kwargs, stream: z}


def pick_stream(
    name: str, outputs: Any, result: int | None, given: Tensor, before: int
) -> tuple[Tensor, tuple[Any, ...]]:
    """The stream among a block's results, and the others.

    Args:
        name: of the block, for errors.
        outputs: what it returned.
        result: which of several results is the stream, None where it returns one tensor.
        given: the stream that it was given.
        before: the version of that when the block began.

    Raises:
        StreamError: the result has not the shape of what was given, or that was changed in place.
    """
    others: tuple[Any, ...] = ()
    if result is not None and isinstance(outputs, tuple | list) and len(outputs) > result:
        others = (*outputs[:result], *outputs[result + 1 :])
        outputs = outputs[result]
    if not isinstance(outputs, Tensor) or outputs.shape != given.shape:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise StreamError(f"{name}: expected an output of the shape of its input, {tuple(given.shape)}, got {got}.")
    if version(given) != before:
        raise StreamError(
            f"{name} changes its input in place, so the stream cannot go through it. Make the first operation "
            "of the block an out-of-place one (for activations inplace=False) before converting."
        )
    return outputs, others
