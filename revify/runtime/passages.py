"""What a tape keeps of one coupling on its way: see `rewinding`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from revify.runtime.layers import Layer
from revify.runtime.reruns import Rerun
from revify.runtime.turns import Turn, current_turn, own_turn

SAMPLES = 256  # of each stream, to measure the drift


@dataclass(slots=True)
class Passage:
    """What the tape keeps of one layer.

    Args:
        layer: the layer.
        reruns: of its branch calls, by the names of their results.
        needs_grad: which values had a gradient.
        strides: of every value, which its reconstruction must have too: kernels depend on them.
        marks: of the input streams, a checksum or a sample.
        residues: the packed bits of values that contracted.
    """

    layer: Layer
    reruns: dict[tuple[str, ...], Rerun] = field(default_factory=dict)
    needs_grad: dict[str, bool] = field(default_factory=dict)
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    marks: dict[str, Tensor] = field(default_factory=dict)
    residues: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Named:
    """Stands in a graph for a value of a layer's program.

    Args:
        had_again: gives it, in a turn of its own.
        turn: in which the layer ran.
    """

    had_again: Callable[[], Tensor]
    turn: Turn | None = field(default_factory=current_turn)

    def load(self) -> Tensor:
        """The value."""
        with own_turn(self.turn):
            return self.had_again()


def sample(stream: Tensor) -> Tensor:
    """Up to SAMPLES values, evenly spread."""
    flat = stream.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].clone()


def place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Where a tensor's values lie, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()
