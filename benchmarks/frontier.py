"""Budgets beside what plans within them need: predicted and measured peak of one training step; with --time the step time.

    python benchmarks/frontier.py [--models resnet50 …] [--batch 2] [--size 96] [--budgets 4] [--time 7] [--name frontier]

Budgets lie between the least that any plan needs and ordinary autograd's peak, in equal ratios. Bytes are those of the
allocator above what is resident, in a second step, fp32. Relative times are predicted from work, not seconds; --time adds
processor seconds of the step, the median of ratios of alternating runs, to the plain step. Exit status 1 where a measured
peak is over its budget by more than 3 %, or the median of predicted / measured is off by more than 3 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter

import timm
import torch
from common import Results
from torch import Tensor, nn

import revify
from revify.estimates import CHECKPOINTED, THIS_PLAN
from revify.measuring.measuring import checkpoint_blocks, mean_square
from revify.measuring.memory import count_memory

MODELS = (
    "vit_tiny_patch16_224",
    "resnet18",
    "resnet50",
    "convnext_atto",
    "efficientnet_b0",
    "mixer_s32_224",
    "swin_s3_tiny_224",
)
FIXED_SIZE = ("vit", "mixer", "swin")  # which run at their own size only


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=96, help="of images, where a model takes any")
    parser.add_argument("--budgets", type=int, default=4)
    parser.add_argument("--time", type=int, default=0, help="alternating runs; 0 times nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="frontier", help="of the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = {
        "model": 22,
        "form": 14,
        "budget MB": 9,
        "predicted MB": 12,
        "measured MB": 11,
        "ratio": 6,
        "time": 6,
        "step to plain": 13,
        "coded/again/kept": 16,
    }
    results = Results(options.name, columns)
    ratios, over = list[float](), list[float]()
    for name in options.models:
        found = one(results, name, options)
        ratios += [predicted / measured for _, predicted, measured in found]
        over += [measured / budget for budget, _, measured in found if budget]
    results.say(f"predicted / measured: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    results.target("median of predicted / measured, away from 1", abs(statistics.median(ratios) - 1), 0.03)
    results.target("the worst measured peak / budget", max(over), 1.03)
    return results.write()


def one(results: Results, name: str, options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Rows for one model; budget (0 for none), predicted and measured bytes of each."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    size = model.pretrained_cfg["input_size"][-1] if name.startswith(FIXED_SIZE) else options.size
    images = torch.randn(options.batch, 3, size, size)
    plan = revify.plan(model, images, budget="min")
    plain, usual, least = (p for p in plan.points[:3])
    rival = timm.create_model(name).train()
    checkpoint_blocks(rival, revify.plan(model, images))
    forms: dict[str, tuple[nn.Module, int, int, float]] = {
        "plain": (model, 0, plain.peak, 1.0),
        CHECKPOINTED: (rival, 0, usual.peak, usual.time),
        "default": forecast(revify.convert(model, images, plan=revify.plan(model, images)), 0),
    }
    for number in range(options.budgets):
        budget = round(least.peak * (plain.peak / least.peak) ** (number / options.budgets))
        within = revify.convert(model, images, budget="min" if number == 0 else budget)
        forms[f"budget {number}"] = forecast(within, budget)
    times = step_times({form: made for form, (made, *_) in forms.items()}, images, options.time)
    found = []
    for form, (made, budget, predicted, share) in forms.items():
        measured = peak(made, images)
        mb = round(budget / 1e6, 2) if budget else "–"
        step = times.get(form, "–")
        results.row(name, form, mb, predicted / 1e6, measured / 1e6, predicted / measured, share, step, modes_of(made))
        found.append((budget, predicted, measured))
    return found


def forecast(model: nn.Module, budget: int) -> tuple[nn.Module, int, int, float]:
    """A converted model with its budget, and what its plan predicts."""
    own = next(point for point in model.revify_plan.points if point.name == THIS_PLAN)
    return model, budget, own.peak, own.time


def modes_of(model: nn.Module) -> str:
    """How many blocks of stages are coded, run again and kept."""
    plan = getattr(model, "revify_plan", None)
    if plan is None:
        return "–"
    modes = Counter(block.mode for stage in plan.stages for block in stage.blocks)
    return f"{modes[None]}/{modes['recompute']}/{modes['keep']}"


def step_times(forms: dict[str, nn.Module], images: Tensor, runs: int) -> dict[str, float]:
    """The median ratio of each form's step time to the plain one's."""
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    order = list(forms)
    for number in range(runs):
        for form in order[number % len(order) :] + order[: number % len(order)]:
            start = time.process_time()
            mean_square(forms[form](images)).backward()
            seconds[form].append(time.process_time() - start)
    return {
        form: statistics.median(a / b for a, b in zip(found, seconds["plain"], strict=True))
        for form, found in seconds.items()
        if found
    }


def peak(model: nn.Module, images: Tensor) -> int:
    """Bytes above what is resident, in the second step: the first allocates gradients."""
    mean_square(model(images)).backward()
    return count_memory(lambda: mean_square(model(images)), images.device).peak


if __name__ == "__main__":
    sys.exit(main())
