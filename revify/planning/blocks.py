"""Calls and graph → residual blocks, or refusals with path, reason and remedy.

A module is a residual block when a path of additions leads from its input to its output:

        x ──────────────────┐                x ─── norm ─ conv ───┐
        └─ norm ─ attn ─ (+) ┴─ … (+) → y     └────────────────── (+) ── act → y

Walking back from y we may pass additions, operations that only move elements (reshape, permute, window, crop), scaling by
something that does not depend on x, and, before an addition is met, activations and norms ("post-activation",
"post-norm"). The walk succeeds when it comes to x straight from an addition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from revify.reading.observing import Call, Observation, TensorInput
from revify.reading.roles import Shortcut, find_shortcut
from revify.reading.tracing import Trace


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """A module that adds to its input.

    Args:
        call: its one call in the observed pass; of several results, `output` is the one that is the stream.
        stream: the input that is the stream.
        shortcut: what lies on the shortcut.
        result: which of several results is the stream, None where it returns one tensor.
    """

    call: Call
    stream: TensorInput
    shortcut: Shortcut
    result: int | None = None

    def continues(self, other: ResidualBlock) -> bool:
        """Whether its stream is what the other returned, of the same shape and type."""
        alike = (self.call.shape, self.call.dtype) == (other.call.shape, other.call.dtype)
        return alike and self.stream.key == other.call.output


def find_blocks(observation: Observation, trace: Trace, modules: dict[str, nn.Module]) -> tuple[ResidualBlock, ...]:
    """Every module of the model that is called once and adds to its input, at every depth of the module tree.

    Args:
        observation: the calls of one forward pass.
        trace: of the whole model, or a recording of it.
        modules: the model's modules by path.

    Returns:
        The residual blocks, in order of their calls.
    """
    counts: dict[str, int] = {}
    for call in observation.calls:
        counts[call.path] = counts.get(call.path, 0) + 1
    blocks = []
    for call in observation.calls:
        if counts[call.path] == 1 and list(modules[call.path].children()):
            found = [b for view in views_of(call) for b in _blocks_of(view, call, trace)]
            blocks += sorted(found, key=lambda block: -math.prod(block.call.shape))[:1]
    return tuple(blocks)


def views_of(call: Call) -> list[tuple[int | None, Call]]:
    """The call as one that returns one tensor: itself, or with each of its results for its output."""
    if call.output is not None:
        return [(None, call)]
    return [(r.position, replace(call, output=r.key, shape=r.shape, dtype=r.dtype)) for r in call.results]


def _blocks_of(view: tuple[int | None, Call], whole: Call, trace: Trace) -> Iterator[ResidualBlock]:
    result, call = view
    for stream in call.inputs:
        alike = (stream.shape, stream.dtype) == (call.shape, call.dtype) and stream.dtype.is_floating_point
        if not alike or stream.changed or stream.key == call.output:
            continue
        shortcut = _shortcut_of(whole, stream, result, trace)
        if shortcut is not None:
            yield ResidualBlock(call, stream, shortcut, result)
            return


def _shortcut_of(call: Call, stream: TensorInput, result: int | None, trace: Trace) -> Shortcut | None:
    calls = trace.calls.get(call.path, [])
    if len(calls) != 1:
        return None
    return find_shortcut(calls[0].given(stream.argument), calls[0].result(result), trace.modules)
