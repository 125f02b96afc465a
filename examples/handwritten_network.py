"""A network of one's own: residual additions in the loop of the network, or within a module for each.

Both convert. Where torch.fx cannot follow the loop (it asks for values, or draws numbers), a module around each addition is
what revify needs: its output is then the next value of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import revify


def branch(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Inline(nn.Module):
    """The additions stand in the loop of the network: no module adds to its input."""

    def __init__(self, width: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(branch(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Block(nn.Module):
    """The same addition, within a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = branch(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def main() -> None:
    tokens = torch.randn(2, 5, 16)
    for name, model in (
        ("the loop in the network", Inline()),
        ("a block around each addition", nn.Sequential(*(Block(16) for _ in range(6)))),
    ):
        converted = revify.convert(model, tokens)
        converted(tokens).square().sum().backward()
        print(f"{name}: {len(converted.revify_plan.stages[0].steps)} blocks in one stage")


if __name__ == "__main__":
    main()
