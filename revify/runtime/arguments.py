"""The stream among a block's arguments: taken out, and put in again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from revify.errors import StreamError


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
