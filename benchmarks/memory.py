"""Peak memory and step time of ViT-Ti, 12 to 48 blocks: plain, checkpointed, converted with 0 to 4 bits.

Every row comes from one `revify.measure`: the three forms on the same batch in one run, timed in alternation.
Exit status 1 if a target of the project is missed.
"""

from __future__ import annotations

import argparse
import sys

import timm
import torch
from common import Results

import revify
from revify.measuring.report import Report

DEPTHS = (12, 24, 48)
BITS = (0, 1, 2, 4)
AGAINST_CHECKPOINTING = {12: 0.80, 24: 0.57, 48: 0.38}
STEP_TIME = 1.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 224, 224, device=options.device)
    results = Results(
        "memory" if options.device == "cpu" else f"memory-{options.device}",
        {"depth": 5, "form": 20, "peak MB": 8, "to ckpt": 7, "held MB": 8, "step s": 7, "time to ckpt": 12},
    )
    reports: dict[tuple[int, int], Report] = {}
    for depth in DEPTHS:
        for bits in BITS:
            model = timm.create_model("vit_tiny_patch16_224", depth=depth).to(options.device)
            plan = revify.plan(model, images[:1], bits=bits)
            report = revify.measure(model, images, plan=plan, repeats=options.repeats)
            reports[depth, bits] = report
            if bits == BITS[0]:
                add(results, depth, "plain", report)
                add(results, depth, "checkpointed", report)
            add(results, depth, "converted", report, bits)
    results.say("")
    judge(results, reports, options.batch)
    return results.write()


def add(results: Results, depth: int, form: str, report: Report, bits: int | None = None) -> None:
    """One form of one report as a row."""
    row = getattr(report, form)
    results.row(
        depth,
        form if bits is None else f"{form}, {bits} bits",
        round(row.peak_bytes / 1e6, 2),
        row.peak_bytes / report.checkpointed.peak_bytes,
        round(row.held_bytes / 1e6, 2),
        row.step_seconds,
        row.time_ratio,
    )


def judge(results: Results, reports: dict[tuple[int, int], Report], batch: int) -> None:
    """The project's figures, one line each."""

    def peak(depth: int, bits: int) -> int:
        found = reports[depth, bits].converted.peak_bytes
        if found is None:
            raise SystemExit(f"out of memory at depth {depth}, {bits} bits")
        return found

    shallow, deep = DEPTHS[0], DEPTHS[-1]
    elements = batch * 197 * 192  # of the stream of ViT-Ti at 224 pixels
    results.target(f"peak at depth {deep} / depth {shallow}, 0 bits", peak(deep, 0) / peak(shallow, 0), 1.02)
    for bits in BITS[1:]:
        growth = (peak(deep, bits) - peak(shallow, bits)) / (deep - shallow) / elements
        results.target(f"bytes per stream element and extra block, {bits} bits", growth, bits / 8 * 1.01)
    for depth in DEPTHS:
        rival = reports[depth, 0].checkpointed.peak_bytes
        limit = AGAINST_CHECKPOINTING[depth]
        results.target(f"peak / checkpointed, depth {depth}, 0 bits", peak(depth, 0) / rival, limit)
    for depth in DEPTHS:
        ratio = reports[depth, 0].converted.time_ratio
        results.target(f"step time / checkpointed, depth {depth}, 0 bits", ratio, STEP_TIME)


if __name__ == "__main__":
    sys.exit(main())
