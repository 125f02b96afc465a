"""Small nets whose blocks have two residual branches, each difficult to cut in its own way."""

from __future__ import annotations

import torch
import zoo
from torch import Tensor, nn

WIDTH = 6


class Feed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, WIDTH))


class Two(nn.Module):
    """Two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Feed(), Feed()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(x)


class Scaled(Two):
    """A scale of the block's own, and an argument that is usually left out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        x = x + self.one(x) * self.scale + shift
        return x + self.two(x)


class InPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += x
        y += self.two(y)
        return y


class Reshaped(Two):
    """As in Swin: the second branch works on another shape, whose sizes come from the block's input."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        x = x + self.one(x)
        x = x.reshape(batch * tokens, width)
        x = x + self.two(x)
        return x.reshape(batch, tokens, width)


class Masked(Two):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.one(x * mask)
        return x + self.two(mask * x)


class Three(Two):
    def __init__(self) -> None:
        super().__init__()
        self.three = Feed()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        x = x + self.two(x)
        return self.three(x) + x


class Normed(Two):
    """BatchNorm counts in each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(self.norm(x))
        return x + self.two(x)


def net(block: type[nn.Module], depth: int = 3) -> nn.Module:
    class Blocks(zoo.Net):
        def __init__(self) -> None:
            super().__init__(*(block() for _ in range(depth)))

    class MaskedBlocks(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(torch.linspace(0.5, 1.5, 5)[:, None])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for part in self.blocks:
                x = part(x, self.mask)
            return self.head(x.mean(1))

    return (MaskedBlocks if block is Masked else Blocks)()
