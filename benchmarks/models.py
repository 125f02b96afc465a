"""Peak memory of one training step of well-known models: plain, timm's checkpointing, converted in several ways.

    python benchmarks/models.py [--models resnet50 swin_tiny_patch4_window7_224 …] [--batch 4]

"branch" is unit="branch", "keep" is transitions="keep". Bytes above what is resident, the same in every run;
nothing is timed. Exit status 1 if a target of the project is missed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import timm
import torch
from common import Results
from torch import Tensor, nn

import revify
from revify.measuring.measuring import checkpoint_blocks
from revify.measuring.memory import count_memory

MODELS = (
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "resnet50",
    "resnet18",
    "efficientnetv2_rw_s",
    "efficientnet_b0",
    "maxvit_tiny_tf_224",
    "regnety_004",
)
FORMS: dict[str, dict[str, Any]] = {
    "0 bits": {"bits": 0},
    "4 bits": {"bits": 4},
    "0 bits, branch": {"bits": 0, "unit": "branch"},
    "0 bits, keep": {"bits": 0, "transitions": "keep"},
}
BRANCH_TO_BLOCK = 0.65  # ViT-Ti


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="models", help="of the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.name, {"model": 28, "form": 16, "peak MB": 8, "to ckpt": 7, "predicted": 9})
    for name in options.models:
        torch.manual_seed(0)
        model = timm.create_model(name).train()
        size = model.pretrained_cfg["input_size"][-1]
        images = torch.randn(options.batch, 3, size, size)
        rival = timm.create_model(name).train()
        checkpoint_blocks(rival, revify.plan(rival, images))
        against = peak(rival, images)
        for form, found in (("plain", peak(model, images)), ("checkpointed", against)):
            results.row(name, form, found / 1e6, found / against, "–")
        peaks = {}
        for form, asked in FORMS.items():
            converted = revify.convert(model, images, **asked)
            peaks[form] = peak(converted, images)
            plan = converted.revify_plan
            results.row(name, form, peaks[form] / 1e6, peaks[form] / against, round(plan.predicted_bytes / 1e6, 1))
        results.target(f"{name}: peak at 4 bits / checkpointed", peaks["4 bits"] / against, 1.0)
        if name == MODELS[0]:
            ratio = peaks["0 bits, branch"] / peaks["0 bits"]
            results.target(f"{name}: peak with steps of branches / of blocks", ratio, BRANCH_TO_BLOCK)
    return results.write()


def peak(model: nn.Module, images: Tensor) -> int:
    """Bytes above what is resident, in the second step: the first allocates gradients."""

    def forward() -> Tensor:
        return torch.nn.functional.cross_entropy(model(images).float(), torch.zeros(len(images), dtype=torch.long))

    forward().backward()
    return count_memory(forward, images.device).peak


if __name__ == "__main__":
    sys.exit(main())
