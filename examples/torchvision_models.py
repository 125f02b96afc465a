"""Models from torchvision, as they come: convert, take one training step, compare with ordinary autograd, go back.

Run it with `python examples/torchvision_models.py`; it takes some seconds and needs no weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

import revify

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "vit_b_16": lambda: torchvision.models.VisionTransformer(32, 8, 4, 4, 48, 96, num_classes=10),
    "swin_t": lambda: torchvision.models.swin_t(num_classes=10),
    "convnext_tiny": lambda: torchvision.models.convnext_tiny(num_classes=10),
    "maxvit_t": lambda: torchvision.models.MaxVit((32, 32), 8, 2, [16, 16], [2, 3], 8, 0.1, num_classes=10),
    "efficientnet_v2_s": lambda: torchvision.models.efficientnet_v2_s(num_classes=10),
}


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    """One backward from one seed (stochastic depth draws random numbers)."""
    model.zero_grad()
    torch.manual_seed(1)
    model(images).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    for name, create in MODELS.items():
        torch.manual_seed(0)
        model, images = create(), torch.randn(2, 3, 32, 32)
        converted = revify.convert(model, images)
        with revify.plain_backward():
            expected = gradients(converted, images)
        exact = all(map(torch.equal, gradients(converted, images), expected))

        reverted = revify.revert(converted).eval()
        with torch.no_grad():
            same = torch.equal(reverted(images), model.eval()(images))

        plan = converted.revify_plan
        stages = "-".join(str(len(stage.blocks)) for stage in plan.stages)
        print(f"{name}: stages {stages}, {plan.stage_share:.0%} of the saved bytes, exact {exact}, reverted {same}")


if __name__ == "__main__":
    main()
