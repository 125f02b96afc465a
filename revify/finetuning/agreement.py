"""Images for calibration, and how far a converted model says what the original says on images that it was not fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from revify.calibration.batches import main_output
from revify.calibration.settling import deviation
from revify.errors import RevifyError
from revify.finetuning.data import ImageData, Images
from revify.finetuning.modes import evaluating

HELD_OUT = 256  # images at most on which agreement is measured
_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class Agreement:
    """Converted and original on held-out images.

    Args:
        images: how many.
        same: share of them, 0…1, that both put first into the same class (for features: where the same one is largest).
        deviation: |y − y*| / |y*| of the outputs.
    """

    images: int
    same: float
    deviation: float

    def __str__(self) -> str:
        return (
            f"converted and original agree on {self.same:.1%} of {self.images} held-out images; "
            f"their outputs differ by {self.deviation:.1%}"
        )


def calibration_images(data: ImageData, count: int, model: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Images [n, C, H, W] spread evenly over the training images, prepared as for validation.

    Raises:
        RevifyError: a count below 1.
    """
    if count < 1:
        raise RevifyError(f"calibration needs at least one image, not {count}: some 32 to 256 do.")
    return _prepared(data, data.train, count, model, input_size)


def agreement(
    converted: nn.Module, original: nn.Module, data: ImageData, input_size: tuple[int, int, int]
) -> Agreement:
    """Compare the two models, in eval mode, on held-out images."""
    images = _prepared(data, data.validation, HELD_OUT, original, input_size)
    outputs = [_outputs(model, images) for model in (converted, original)]
    same = (outputs[0].argmax(-1) == outputs[1].argmax(-1)).double().mean()
    return Agreement(len(images), float(same), deviation([outputs[0]], [outputs[1]]))


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    device = next((p.device for p in model.parameters()), images.device)
    with evaluating(model), torch.no_grad():
        parts = images.to(device).split(_TOGETHER)  # type: ignore[no-untyped-call]
        return torch.cat([main_output(model(part)) for part in parts])


def _prepared(
    data: ImageData, images: Images, count: int, model: Any, input_size: tuple[int, int, int]
) -> Tensor:  # Any: timm reads the configuration of every kind of model
    config = timm.data.resolve_data_config({"input_size": input_size}, model=model)
    if input_size[0] == 1:
        config["mean"], config["std"] = config["mean"][:1], config["std"][:1]
    crop = {"crop_pct": data.crop_pct} if data.crop_pct else {}
    prepared = Images(images.samples, images.mode, timm.data.create_transform(**{**config, **crop}))
    number = min(count, len(prepared))
    places = torch.linspace(0, len(prepared) - 1, number).round().long().tolist()
    return torch.stack([prepared[place][0] for place in places])
