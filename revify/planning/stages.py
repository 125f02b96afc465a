"""Residual blocks → stages: maximal runs on one stream, each block's input being the output of the one before.

Runs exist at several depths of the module tree (a block, the container of blocks, a branch that adds to its own input).
Which of them are the stages is decided by what the whole plan would hold (`choosing`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from revify.planning.blocks import ResidualBlock
from revify.planning.refusals import parents
from revify.reading.observing import Observation, ValueKey
from revify.reading.tracing import Trace


class Spanning(Protocol):
    """What lies along the forward pass, and carries a stream."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """From where to where its parts run, in calls that had started."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stream."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the stream."""


class Along:
    """What follows for a run from where it lies along the forward pass, and from its stream."""

    __slots__ = ()

    @property
    def stream_bytes(self: Spanning) -> int:
        """Bytes of one stream value, which is held in float32 or longer."""
        return math.prod(self.shape) * max(4, self.dtype.itemsize)

    @property
    def start(self: Spanning) -> int:
        """Where its first part begins."""
        return self.spans[0][0]

    @property
    def end(self: Spanning) -> int:
        """Where its last part ends."""
        return self.spans[-1][1]

    def overlaps(self: Spanning, other: Spanning) -> bool:
        """Whether a module of the one contains, or is, one of the other."""
        return any(a < d and c < b for a, b in self.spans for c, d in other.spans)


@dataclass(frozen=True, slots=True)
class Stage(Along):
    """A run of at least two blocks of the same shape, in the order of their calls.

    Args:
        blocks: one for each call.
        within: where something lies between them, the path of the module in whose calls they form a pass.
    """

    blocks: tuple[ResidualBlock, ...]
    within: str | None = None

    @property
    def saved_bytes(self) -> int:
        """What autograd saves in all of its blocks."""
        return sum(block.call.saved_bytes for block in self.blocks)

    @property
    def largest_block_bytes(self) -> int:
        """What autograd saves in the block that saves most: what a backward must hold at a time."""
        return max(block.call.saved_bytes for block in self.blocks)

    @property
    def benefit(self) -> int:
        """Bytes that the reversible stage does not hold."""
        return self.saved_bytes - self.largest_block_bytes - 2 * self.stream_bytes

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """From where to where each block runs, in calls that had started."""
        return tuple((block.call.order, block.call.end) for block in self.blocks)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of its blocks."""
        return tuple(block.call.path for block in self.blocks)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stream."""
        return self.blocks[0].stream.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the stream."""
        return self.blocks[0].stream.dtype

    def part(self, first: int, last: int) -> Stage:
        """The blocks from the first up to, but without, the last."""
        return Stage(self.blocks[first:last], self.within)


def find_runs(blocks: tuple[ResidualBlock, ...], trace: Trace) -> tuple[Stage, ...]:
    """Maximal chains at each depth; where two blocks continue a stream, the one of the same class does.

    Args:
        blocks: all residual blocks, at every depth.
        trace: of the model: a link that was observed must also stand in the graph, where there is one.
    """
    starting: dict[tuple[ValueKey, int], list[ResidualBlock]] = defaultdict(list)
    for block in blocks:
        starting[block.stream.key, _depth(block)].append(block)
    runs: list[Stage] = []
    taken: set[str] = set()
    for block in blocks:
        if block.call.path in taken:
            continue
        run = [block]
        while following := _next(run[-1], starting, trace):
            run.append(following)
        taken.update(b.call.path for b in run)
        if len(run) > 1:
            runs.append(Stage(tuple(run)))
    return tuple(runs)


def home_of(paths: Sequence[str], observation: Observation) -> str:
    """The innermost module that all of these lie in, and that is called just once; "" for the model itself."""
    counts = Counter(call.path for call in observation.calls)
    above = [set(parents(path)) for path in paths]
    common = [path for path in parents(paths[0]) if all(path in others for others in above)]
    return next((path for path in reversed(common) if counts[path] == 1), "")


def channel_axis(
    paths: tuple[str, ...], shape: tuple[int, ...], observation: Observation, modules: dict[str, nn.Module]
) -> int | None:
    """Which axis of a stage's stream holds the channels, by the first layer in it that treats channels apart.

    Args:
        paths: of the stage's modules.
        shape: of its stream.
        observation: its forward pass.
        modules: the model's modules by path.

    Returns:
        The axis counted from the front, or None where no layer tells.
    """
    within = tuple(path + "." for path in paths)
    for call in observation.calls:
        if f"{call.path}.".startswith(within) and any(i.shape == shape for i in call.inputs):
            axis = _axis_of(modules[call.path], shape)
            if axis is not None:
                return axis
    return None


def _axis_of(layer: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Where a layer expects the channels of an input of this shape."""
    in_front = isinstance(layer, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm)
    if in_front or type(layer).__name__.endswith("Norm2d"):
        return 1
    width = getattr(layer, "in_features", None) or getattr(layer, "normalized_shape", (None,))[-1]
    return len(shape) - 1 if width == shape[-1] else None


def _next(
    block: ResidualBlock, starting: dict[tuple[ValueKey, int], list[ResidualBlock]], trace: Trace
) -> ResidualBlock | None:
    assert block.call.output is not None  # a residual block returns one tensor
    candidates = [
        other
        for other in starting.get((block.call.output, _depth(block)), [])
        if (other.call.shape, other.call.dtype) == (block.call.shape, block.call.dtype) and _linked(block, other, trace)
    ]
    same_class = [other for other in candidates if other.call.kind == block.call.kind]
    return next(iter(same_class or candidates), None)


def _linked(block: ResidualBlock, other: ResidualBlock, trace: Trace) -> bool:
    """Whether the graph, too, says that one block's output is the other's input."""
    if trace.graph is None:
        return True
    source, target = trace.calls[block.call.path][0], trace.calls[other.call.path][0]
    return target.given(other.stream.argument) is source.result(block.result)


def _depth(block: ResidualBlock) -> int:
    return block.call.path.count(".")
