"""One training step of well-known models beside timm's checkpointing: peak memory, and with --time the step time.

    python benchmarks/models.py [--models resnet50 …] [--batch 4] [--depths 12 24 48] [--time 7] [--name models]

Each form in fp32 and under bf16 autocast. "branch" is unit="branch", "keep" is transitions="keep". Bytes above what is
resident, the same in every run. Times are processor seconds of the step (other processes do not count), the median of
ratios of alternating runs. --depths takes vit_tiny_patch16_224 with these numbers of blocks instead of the models. Exit
status 1 if a target of the project is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
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
    "coded, 8 bits": {},
    "coded, 8 bits, branch": {"unit": "branch"},
    "coded, 4 bits": {"bits": 4},
    "coded, 4 bits, branch": {"bits": 4, "unit": "branch"},
    "coded, 8 bits, keep": {"transitions": "keep"},
    "recurrence, 4 bits": {"step": "recurrence"},
    "recurrence, 0 bits": {"bits": 0},
    "recurrence, 0 bits, branch": {"bits": 0, "unit": "branch"},
}
DEPTH_TARGETS = {
    "fp32": {12: 0.74, 24: 0.58, 48: 0.45},
    "bf16": {12: 0.80, 24: 0.66, 48: 0.52},
}  # of checkpointing's peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--depths", nargs="+", type=int, default=[])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--time", type=int, default=0, help="alternating runs; 0 times nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="models", help="of the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = {"model": 28, "precision": 9, "form": 26, "peak MB": 8, "to ckpt": 7, "predicted": 9, "step to ckpt": 12}
    results = Results(options.name, columns)
    subjects = [("vit_tiny_patch16_224", depth) for depth in options.depths] or [(name, 0) for name in options.models]
    ratios: dict[tuple[str, str], list[float]] = {}
    for name, depth in subjects:
        given = {"depth": depth} if depth else {}
        for precision in options.precisions:
            found = one(results, name, given, precision, options)
            for form, ratio in found.items():
                ratios.setdefault((precision, form), []).append(ratio)
            if depth:
                best = min(found["coded, 8 bits"], found["coded, 8 bits, branch"])
                target = DEPTH_TARGETS[precision][depth]
                results.target(
                    f"{name}, {depth} blocks, {precision}: the better unit at 8 bits / checkpointed", best, target
                )
            else:
                results.target(f"{name}, {precision}: default / checkpointed", found["coded, 8 bits"], 1.0)
    for (precision, form), values in ratios.items():
        results.say(f"geometric mean of the peaks, {precision}, {form}: {statistics.geometric_mean(values):.3f}")
    return results.write()


def one(
    results: Results, name: str, given: dict[str, Any], precision: str, options: argparse.Namespace
) -> dict[str, float]:
    """A row for each form of one model in one precision; the peaks as shares of checkpointing's."""
    torch.manual_seed(0)
    model = timm.create_model(name, **given).train()
    size = model.pretrained_cfg["input_size"][-1]
    images = torch.randn(options.batch, 3, size, size)
    forms = {"plain": model, "checkpointed": timm.create_model(name, **given).train()}
    checkpoint_blocks(forms["checkpointed"], revify.plan(model, images))
    forms |= {form: revify.convert(model, images, **FORMS[form]) for form in options.forms}
    peaks = {form: peak(candidate, images, precision) for form, candidate in forms.items()}
    times = step_times(forms, images, precision, options.time)
    label = name + "".join(f", {value} {key}" for key, value in given.items())
    for form, found in peaks.items():
        plan = getattr(forms[form], "revify_plan", None)
        predicted = round(plan.predicted_bytes / 1e6, 1) if plan is not None and precision == "fp32" else "–"
        results.row(label, precision, form, found / 1e6, found / peaks["checkpointed"], predicted, times.get(form, "–"))
    return {form: found / peaks["checkpointed"] for form, found in peaks.items()}


def step_times(forms: dict[str, nn.Module], images: Tensor, precision: str, runs: int) -> dict[str, float]:
    """The median ratio of each form's step time to the checkpointed one's."""
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    order = list(forms)
    for number in range(runs):
        for form in order[number % len(order) :] + order[: number % len(order)]:
            start = time.process_time()
            loss_of(forms[form], images, precision).backward()
            seconds[form].append(time.process_time() - start)
    rival = seconds["checkpointed"]
    return {
        form: statistics.median(a / b for a, b in zip(found, rival, strict=True))
        for form, found in seconds.items()
        if found
    }


def loss_of(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """The loss of a training step."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = model(images)
    return torch.nn.functional.cross_entropy(output.float(), torch.zeros(len(images), dtype=torch.long))


def peak(model: nn.Module, images: Tensor, precision: str = "fp32") -> int:
    """Bytes above what is resident, in the second step: the first allocates gradients."""
    loss_of(model, images, precision).backward()
    return count_memory(lambda: loss_of(model, images, precision), images.device).peak


if __name__ == "__main__":
    sys.exit(main())
