"""What calibration costs on a ViT-S: seconds for 64 images, and the step time that the predictor "auto" adds.

    python benchmarks/calibration_cost.py

Real weights and photos of ../shared/data. Step times are medians of alternating runs, as ratios.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from common import Results
from pretrained import flowers, vit_small

import revify


def main() -> int:
    torch.set_num_threads(2)
    results = Results("calibration_cost", {"what": 44, "value": 10})
    model, photos = vit_small(), flowers("train")[0][:64]
    converted = revify.convert(model, photos[:2], bits=2)
    start = time.perf_counter()
    calibrated = revify.calibrate(converted, photos, predictor="auto", bits=2)
    seconds = time.perf_counter() - start
    results.row(f"predictor chosen: {calibrated.revify_plan.stages[0].predictor}", "–")
    results.row("seconds to calibrate on 64 images", seconds)
    forms, times = {"identity": converted, "auto": calibrated}, {"identity": [], "auto": []}
    for _ in range(6):
        for name, form in forms.items():
            start = time.perf_counter()
            form(photos[:8]).square().mean().backward()
            times[name].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(times["auto"][1:], times["identity"][1:], strict=True))
    results.row("step time, auto / identity", ratio)
    results.target("seconds to calibrate on 64 images", seconds, 90)
    results.target("step time, auto / identity", ratio, 1.10)
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
