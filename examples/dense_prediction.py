"""Segmentation and detection: torchvision's FCN and Mask R-CNN, and a U-Net of segmentation_models_pytorch.

A model that takes one batch is converted whole. A detector, whose forward makes batches out of lists of images, gets a
converted backbone: any module inside of a model can be converted by itself and put back in its place.

    pip install torchvision segmentation-models-pytorch
    python examples/dense_prediction.py
"""

from __future__ import annotations

from contextlib import nullcontext

import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import Tensor, nn

import revify

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def fcn() -> nn.Module:
    """Whole: its output is a dictionary."""
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    return revify.convert(model, IMAGES, bits=2)


def unet() -> nn.Module:
    """Whole: the encoder's features go to the decoder, each the output of a stage."""
    return revify.convert(smp.Unet("resnet34", encoder_weights=None, classes=3), IMAGES, bits=2)


def mask_rcnn() -> nn.Module:
    """With a converted backbone."""
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    model.backbone = revify.convert(model.backbone, IMAGES, bits=2)
    return model


def loss_of(model: nn.Module) -> Tensor:
    """Of one training step."""
    if hasattr(model, "rpn"):
        box, mask = torch.tensor([[8.0, 8.0, 40.0, 48.0]]), torch.ones(1, 64, 64, dtype=torch.uint8)
        targets = [{"boxes": box, "labels": torch.tensor([1]), "masks": mask} for _ in IMAGES]
        return sum(model(list(IMAGES), targets).values())
    output = model(IMAGES)
    return (output["out"] if isinstance(output, dict) else output).square().mean()


def gradients(model: nn.Module, *, plain: bool) -> list[Tensor]:
    """Of all parameters, after one step from one seed."""
    model.zero_grad()
    torch.manual_seed(0)
    with revify.plain_backward() if plain else nullcontext():
        loss_of(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    torch.manual_seed(0)
    for create in (fcn, unet, mask_rcnn):
        model = create().train()
        converted = model.backbone if create is mask_rcnn else model
        found, expected = (gradients(model, plain=plain) for plain in (False, True))
        exact = len(found) == len(expected) and all(map(torch.equal, found, expected))
        stages = "-".join(str(len(stage.blocks)) for stage in converted.revify_plan.stages)
        print(f"{create.__name__}: stages {stages}, exact {exact}")


if __name__ == "__main__":
    main()
