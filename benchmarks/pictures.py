"""Draws docs/step.png: the memory of one training step as it goes on, plain, checkpointed and converted.

    python benchmarks/pictures.py [--model vit_tiny_patch16_224] [--depth 24] [--batch 8]

Under bf16 autocast, on the CPU, where the allocator's bytes are exact and the same in every run; each step is drawn over
its own length, so nothing is said about time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import revify
from revify.measuring.measuring import checkpoint_blocks
from revify.measuring.memory import Moment, follow_memory

BINS = 300  # of which the highest value is drawn
PICTURE = Path(__file__).parents[1] / "docs" / "step.png"


def follow(model: nn.Module, images: Tensor) -> list[Moment]:
    """The second step of a model: the first one allocates the gradients."""

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images).float().square().mean()

    model.train()
    forward().backward()
    return follow_memory(forward)


def drawn(moments: list[Moment]) -> tuple[list[float], list[float]]:
    """Share of the step → MB, the highest in each of the bins."""
    start, end = moments[0].nanoseconds, moments[-1].nanoseconds
    highest = [0.0] * BINS
    for moment, following in zip(moments, [*moments[1:], moments[-1]], strict=True):
        first, last = (int((m.nanoseconds - start) / (end - start) * (BINS - 1)) for m in (moment, following))
        for place in range(first, last + 1):
            highest[place] = max(highest[place], moment.allocated / 1e6)
    return [place / (BINS - 1) for place in range(BINS)], highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)

    def create() -> nn.Module:
        return timm.create_model(options.model, depth=options.depth)

    images = torch.randn(options.batch, *create().default_cfg["input_size"])
    checkpointed = create()
    checkpoint_blocks(checkpointed, revify.plan(checkpointed))
    forms = {"plain": create(), "checkpointed": checkpointed, "revify": revify.convert(create())}
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="one training step: forward, then backward",
        ylabel="MB above weights and gradients",
        title=f"{options.model}, {options.depth} blocks, batch {options.batch}, bf16 autocast",
    )
    for (name, model), colour in zip(forms.items(), ("0.6", "tab:orange", "tab:blue"), strict=True):
        moments = follow(model, images)
        peak = max(moment.allocated for moment in moments) / 1e6
        axes.fill_between(*drawn(moments), step="mid", color=colour, label=f"{name}: {peak:.0f} MB at its highest")
        print(f"{name:14} {peak:7.1f} MB")
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.legend()
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
