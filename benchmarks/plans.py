"""What `revify.plan` finds in six well-known models, and how long it takes.

Exit status 1 if the stages are not those of the architecture, or a plan takes 5 seconds or more.
"""

from __future__ import annotations

import sys
import time

import timm
import torch
from common import Results

import revify

# Blocks per stage. The first block of a stage that changes the shape (ResNet, EfficientNet) is a transition.
STAGES = {
    "resnet50": (2, 3, 5, 2),
    "vit_small_patch16_224": (12,),
    "swin_tiny_patch4_window7_224": (2, 2, 6, 2),
    "convnext_tiny": (3, 3, 9, 3),
    "efficientnetv2_rw_s": (2, 3, 3, 5, 8, 14),
    "mixer_b16_224": (12,),
}


def main() -> int:
    torch.set_num_threads(2)
    results = Results(
        "plans", {"model": 29, "stages": 22, "saved MB": 8, "predicted MB": 12, "refusals": 8, "seconds": 7}
    )
    plans = []
    for name, expected in STAGES.items():
        model = timm.create_model(name)
        start = time.perf_counter()
        plan = revify.plan(model)
        seconds = time.perf_counter() - start
        found = tuple(len(stage.blocks) for stage in plan.stages)
        results.row(
            name,
            "-".join(map(str, found)),
            round(plan.saved_bytes / 1e6, 1),
            round(plan.predicted_bytes / 1e6, 1),
            len(plan.refusals),
            round(seconds, 2),
        )
        if found != expected:
            results.say(f"    MISSED: expected {'-'.join(map(str, expected))} blocks")
        results.failed += found != expected or seconds >= 5
        plans.append(plan)
    for plan in plans:
        results.say(f"\n{plan}")
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
