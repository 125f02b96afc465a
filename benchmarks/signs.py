"""Which balanced signs of γ change a network least, over stages of every length.

    python benchmarks/signs.py [--bits 2] [--images 64] [--threads 1]

The pretrained networks of ../shared/data, of which only the first or the last n blocks of each stage are coupled, n = 3, 4, …:
stages of as many lengths as networks of other depths have, with blocks as training leaves them. The rows are the relative
deviation of the output from the plain network's. In the end, for each pattern, how many times that of the best pattern it
was, at worst and on the (geometric) average.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from common import Results
from pretrained import cifar10, cifar_resnet, flowers, vit_small
from torch import Tensor, nn

import revify
from revify.calibration.settling import deviation
from revify.plans import Plan
from revify.rewriting.applying import apply_plan
from revify.words import BALANCED

PATTERNS = ("-++-", "+--+", "+-", "-+", "--++", "+")


def shortened(plan: Plan, part: str) -> Iterator[Plan]:
    """The plan with only the first, or the last, blocks of each stage, from three on."""
    lengths = [len(stage.blocks) for stage in plan.stages]
    for longest in range(3, max(lengths) + 1):
        kept = [max(2, length - max(lengths) + longest) for length in lengths]
        stages = (
            replace(s, blocks=s.blocks[:n] if part == "first" else s.blocks[-n:])
            for s, n in zip(plan.stages, kept, strict=True)
        )
        yield replace(plan, stages=tuple(stages), checkpointed=())


def changed(model: nn.Module, plan: Plan, pattern: str, images: Tensor, wanted: Tensor) -> float:
    """The deviation of the output with these signs."""
    signed = replace(plan, stages=tuple(replace(s, sign="balanced", pattern=pattern) for s in plan.stages))
    return deviation([apply_plan(model, signed).eval()(images)], [wanted])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results("signs", {"network": 9, "part": 5, "coupled": 9, **dict.fromkeys(PATTERNS, 6)})
    photos = cifar10("test", args.images)[0]
    networks = {
        "ResNet-20": (cifar_resnet(20), photos),
        "ResNet-56": (cifar_resnet(56), photos),
        "ViT-S": (vit_small(), flowers("val", 84)[0][: args.images // 6]),
    }
    found: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
    with torch.no_grad():
        for name, (model, images) in networks.items():
            wanted = model(images)
            plan = revify.plan(model, images[:2], bits=args.bits, transitions="keep", step="recurrence")
            for part in ("first", "last"):
                for short in shortened(plan, part):
                    changes = [changed(model, short, pattern, images, wanted) for pattern in PATTERNS]
                    for pattern, change in zip(PATTERNS, changes, strict=True):
                        found[pattern].append(change / min(changes))
                    coupled = "+".join(str(len(stage.blocks) - 1) for stage in short.stages)
                    results.row(name, part, coupled, *changes)
    results.row("times the", "best:", "at worst", *map(max, found.values()))
    results.row("", "", "mean", *map(statistics.geometric_mean, found.values()))
    worst = {pattern: max(ratios) for pattern, ratios in found.items()}
    results.target(f"{BALANCED} at worst, of the best pattern's worst", worst[BALANCED] / min(worst.values()), 1.05)
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
