"""A network of one's own: residuals written into a loop are refused, and what to change is one line.

revify replaces the forward of modules, so the addition must happen within a module: only then can the module's output
be the next value of a stream.
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
    try:
        revify.convert(Inline(), tokens)
    except revify.RefusalError as refusal:
        print(f"refused: {refusal}")

    model = nn.Sequential(*(Block(16) for _ in range(6)))
    converted = revify.convert(model, tokens)
    converted(tokens).square().sum().backward()
    print(f"converted: {len(converted.revify_plan.stages[0].blocks)} blocks in one stage")


if __name__ == "__main__":
    main()
