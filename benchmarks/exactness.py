"""Gradients of the memory-free backward against ordinary autograd on the same converted model: the same bits?

Every parameter, the input, the output and every buffer (BatchNorm statistics) are compared with torch.equal,
in train mode with dropout and drop-path on. Parameters are stirred first, because a freshly made network has
branches that are zero. "zero" counts gradients that are zero all the same: drop-path has dropped that branch
for every image of the batch. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import timm
import torch
from common import Results
from torch import Tensor, nn

import revify

VIT = {"img_size": 64, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}
MODELS = {
    "ViT, 12 blocks": ("vit_tiny_patch16_224", VIT),
    "ViT, 48 blocks": ("vit_tiny_patch16_224", {**VIT, "depth": 48}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 64,
            "window_size": 4,
            "proj_drop_rate": 0.1,
            "attn_drop_rate": 0.1,
            "drop_path_rate": 0.1,
        },
    ),
    "ConvNeXt": ("convnext_tiny", {"drop_path_rate": 0.1, "drop_rate": 0.1}),
    "ResNet-50": ("resnet50", {"drop_path_rate": 0.1, "drop_rate": 0.1}),
    "EfficientNetV2": ("efficientnetv2_rw_s", {"drop_path_rate": 0.1, "drop_rate": 0.1}),
    "MLP-Mixer": ("mixer_s16_224", {"img_size": 64, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}),
}
SIZE = 64
BATCH = 2


@dataclass(frozen=True)
class Run:
    """What one forward and backward gives, by name."""

    tensors: dict[str, Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--bits", nargs="*", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(
        "exactness" if len(options.models) == len(MODELS) else "exactness-part",
        {
            "model": 15,
            "precision": 13,
            "bits": 4,
            "blocks": 6,
            "compared": 8,
            "different": 9,
            "zero": 5,
            "seconds": 7,
        },
    )
    for label in options.models:
        name, settings = MODELS[label]
        torch.manual_seed(0)
        model = stirred(timm.create_model(name, num_classes=10, **settings))
        for autocast in (None, torch.bfloat16):
            for bits in options.bits:
                compare(results, label, model, autocast, bits)
    results.say(f"\n{results.failed} of {len(results.rows)} rows differ from ordinary autograd")
    return results.write()


def compare(results: Results, label: str, model: nn.Module, autocast: torch.dtype | None, bits: int) -> None:
    """One row: both backwards under the same random numbers and the same buffers."""
    start = time.perf_counter()
    converted = revify.convert(model, example=torch.zeros(BATCH, 3, SIZE, SIZE), bits=bits).train()
    buffers = [buffer.clone() for buffer in converted.buffers()]
    with revify.plain_backward():
        expected = run(converted, autocast)
    with torch.no_grad():
        for buffer, value in zip(converted.buffers(), buffers, strict=True):
            buffer.copy_(value)
    found = run(converted, autocast)
    with torch.no_grad():
        for buffer, value in zip(converted.buffers(), buffers, strict=True):
            buffer.copy_(value)
    different = [name for name in expected.tensors if not torch.equal(expected.tensors[name], found.tensors[name])]
    zero = sum(not value.any() for name, value in expected.tensors.items() if name.startswith("grad"))
    results.row(
        label,
        "float32" if autocast is None else "bf16 autocast",
        bits,
        sum(len(stage.blocks) for stage in converted.revify_plan.stages),
        len(expected.tensors),
        len(different),
        zero,
        round(time.perf_counter() - start, 1),
    )
    results.failed += bool(different)
    for name in different[:3]:
        results.say(f"    {name} differs by up to {(expected.tensors[name] - found.tensors[name]).abs().max():.3g}")


def run(model: nn.Module, autocast: torch.dtype | None) -> Run:
    """Forward and backward from one seed."""
    torch.manual_seed(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE, requires_grad=True)
    weights = torch.randn(BATCH, 10)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = model(images)
    (output.float() * weights).sum().backward()
    tensors = {"output": output.detach(), "grad of the input": images.grad}
    for name, parameter in model.named_parameters():
        tensors[f"grad of {name}"] = parameter.grad
    for name, buffer in model.named_buffers():
        tensors[f"buffer {name}"] = buffer.clone()
    missing = [name for name, value in tensors.items() if value is None]
    if missing:
        raise SystemExit(f"no gradient for {missing[:3]}: this benchmark would compare nothing")
    return Run(tensors)


def stirred(model: nn.Module) -> nn.Module:
    """Every parameter moved a little, so that no branch is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


if __name__ == "__main__":
    sys.exit(main())
