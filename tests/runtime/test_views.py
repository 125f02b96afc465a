"""A side input that is the stream, or a view of it, is not held beside it: the memory does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from asserts import assert_same_gradients, converted, inputs_of
from ledger import Ledger
from torch import Tensor, nn

SHAPE = (2, 20, 16)
STREAM = 2 * 20 * 16 * 4

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "a part": lambda x: x[:, 1:],
    "detached": lambda x: x.detach(),
    "every other": lambda x: x[..., ::2],
}


class Mixed(zoo.Mlp):
    """A block that is given its stream a second time."""

    def forward(self, x: Tensor, again: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.tanh(again.flatten(1).mean(1) ** 2)[:, None, None]


class StreamTwice(zoo.Net):
    SHAPE = SHAPE

    def __init__(self, depth: int, way: str) -> None:
        block = Mixed(16)
        blocks = [Mixed(16) for _ in range(depth)]
        for other in blocks:  # tied, so that only activations can grow with depth
            other.norm, other.up, other.down = block.norm, block.up, block.down
        super().__init__(*blocks)
        self.way = WAYS[way]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, self.way(x))
        return self.head(x.mean(1))


def held(model: nn.Module) -> int:
    x = inputs_of(model)[0]
    with Ledger() as ledger:
        loss = model(x).sum()
        between = ledger.alive()
        loss.backward()
    return between


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("step", "bits", "each"), [("recurrence", 0, 200), ("coded", 4, 600)])
@pytest.mark.sampled(3)
def test_what_is_held_does_not_grow_with_depth(way: str, step: str, bits: int, each: int) -> None:
    """For each block checksums, or its code; a stream value has 2,560 bytes."""
    few, many = (held(converted(lambda: StreamTwice(depth, way), step=step, bits=bits)) for depth in (4, 24))  # noqa: B023
    assert many - few < 20 * each


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grid", [12, 32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_gradients_are_those_of_autograd(way: str, grid: int, autocast: torch.dtype | None) -> None:
    for options in ({"bits": 2, "grid": grid, "step": "recurrence"}, {"step": "coded"}):
        model = converted(lambda: StreamTwice(4, way), **options)
        assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.parametrize("way", ["itself", "transposed"])
def test_other_precisions(way: str) -> None:
    model = converted(lambda: StreamTwice(4, way), bits=1).bfloat16()
    assert_same_gradients(model, [x.bfloat16() for x in inputs_of(model)])
