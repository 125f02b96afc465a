"""RevNets (Gomez et al. 2017) out of ResNets: revify.convert(model, streams="split").

Each residual block of the ResNet becomes F or G of a reversible unit, from one half of the channels to the other:

    y1 = x1 + F(x2)        y2 = x2 + G(y1)

The widths are the paper's, table 1; a unit is two blocks. The strided block at the head of a stage stays an ordinary one,
where the paper makes it a unit of its own kind. F and G keep the width inside them, so the ResNet has half of it there.

    python examples/revnets.py [38 110 164 56 104]
"""

from __future__ import annotations

import sys

import timm.models.resnet
import torch
from torch import Tensor, nn
from torch.nn import functional

import revify


class PreActivationBlock(nn.Module):
    """x + conv(relu(bn(…))), two convolutions of 3×3, or 1×1, 3×3, 1×1 (He et al. 2016b); option A shortcuts."""

    def __init__(self, width_in: int, width: int, inner: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        sizes = [(width_in, inner, 1), (inner, inner, 3), (inner, width, 1)] if bottleneck else []
        sizes = sizes or [(width_in, inner, 3), (inner, width, 3)]
        strided = len(sizes) - 2  # the first 3×3
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w, _, _ in sizes)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, k, stride if place == strided else 1, k // 2, bias=False)
            for place, (i, o, k) in enumerate(sizes)
        )
        self.stride, self.wider = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(functional.relu(norm(y)))
        if self.stride > 1:
            x = functional.avg_pool2d(x, self.stride)
        if self.wider:
            x = functional.pad(x, (0, 0, 0, 0, 0, self.wider))
        return x + y


class CifarResNet(nn.Module):
    """Three stages at 32, 16 and 8 pixels.

    Args:
        stem: channels of the first convolution.
        widths: channels of the stages.
        blocks: in each stage.
        inside: width within a block, as a share of the stage's.
        bottleneck: three convolutions in a block.
    """

    def __init__(
        self, stem: int, widths: tuple[int, ...], blocks: int, inside: float = 1, bottleneck: bool = False
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        stages = []
        for number, width in enumerate(widths):
            shapes = [(stem, 2 if number else 1), *[(width, 1)] * (blocks - 1)]
            stages.append(
                nn.Sequential(*(PreActivationBlock(w, width, int(width * inside), s, bottleneck) for w, s in shapes))
            )
            stem = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(stem)
        self.head = nn.Linear(stem, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stages(self.stem(x))))
        return self.head(x.mean((2, 3)))


def resnet(depth: int) -> nn.Module:
    """The ResNet that a RevNet of the paper is compared with: 32, 110 or 164 for CIFAR-10, 50 or 101 for ImageNet."""
    if depth in (50, 101):
        return timm.create_model(f"resnet{depth}")
    if depth == 164:
        return CifarResNet(16, (64, 128, 256), 18, inside=1 / 4, bottleneck=True)
    return CifarResNet(16, (16, 32, 64), (depth - 2) // 6)


def wide_resnet(depth: int) -> nn.Module:
    """The ResNet with the widths of RevNet-38, -110, -164 (CIFAR-10), -56 or -104 (ImageNet), before conversion."""
    if depth in (56, 104):
        layers = (4, 4, 6, 4) if depth == 56 else (4, 4, 22, 4)
        block = timm.models.resnet.Bottleneck
        return timm.models.resnet.ResNet(block, layers, channels=(128, 256, 512, 832), base_width=32)
    if depth == 38:
        return CifarResNet(32, (32, 64, 112), 6, inside=1 / 2)
    if depth == 110:
        return CifarResNet(32, (32, 64, 128), 18, inside=1 / 2)
    return CifarResNet(32, (128, 256, 512), 18, inside=1 / 8, bottleneck=True)


def revnet(depth: int) -> nn.Module:
    """RevNet-38, -110, -164, -56 or -104, to be trained from scratch."""
    size = 224 if depth in (56, 104) else 32
    example = torch.zeros(2, 3, size, size)
    return revify.convert(wide_resnet(depth), example, method=revify.presets.revnet)


def count(model: nn.Module) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def main() -> None:
    print("RevNet      parameters   its ResNet   parameters   reversible blocks")
    rivals = {38: 32, 110: 110, 164: 164, 56: 50, 104: 101}
    for depth in map(int, sys.argv[1:]) if sys.argv[1:] else rivals:
        plain = rivals[depth]
        with torch.device("meta"):  # to count parameters, no numbers are needed
            model, rival = revnet(depth), resnet(plain)
        blocks = sum(len(stage.blocks) for stage in model.revify_plan.stages)
        print(f"RevNet-{depth:<6}{count(model):8.2f} M   ResNet-{plain:<6}{count(rival):8.2f} M   {blocks:6}")
    model = revnet(38)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    functional.cross_entropy(model(images), labels).backward()
    print(f"one training step of RevNet-38: gradient of the stem {model.stem.weight.grad.norm():.4f}")


if __name__ == "__main__":
    main()
