"""How much coded steps change what a network computes while it trains, beside what bf16 autocast changes.

    python benchmarks/change.py [--threads 2]

Networks with real weights (../shared/data) and those of subjects.py, in training mode, without dropout: the relative change of
the output, |y − y₀| / |y₀| over all samples, against the plain network in fp32. In eval mode nothing changes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import subjects
import torch
from common import Results
from pretrained import cifar10, cifar_resnet, flowers, vit_small
from torch import Tensor, nn

import revify

SUBJECTS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vit_small": lambda: (vit_small(), flowers("val", 224)[0][:16]),
    "resnet20": lambda: (cifar_resnet(20), cifar10("test", 128)[0]),
    "resnet56": lambda: (cifar_resnet(56), cifar10("test", 128)[0]),
    "text": lambda: (subjects.reader(), subjects.help_pages()[1][0][:32]),
    "convnext": lambda: (subjects.convnext(*cifar10("train", 10_000)), cifar10("test", 128)[0]),
}
BITS = (8, 6, 5, 4, 3, 2)


def output(model: nn.Module, inputs: Tensor, *, autocast: bool = False) -> Tensor:
    """Of the model in training mode; its statistics stay as they are."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found: Tensor = copy.deepcopy(model).train()(inputs)
    return found.float()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="change", help="of the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = {"network": 10, "unit": 7, "bf16": 8, **{f"{bits} bits": 8 for bits in BITS}}
    results = Results(options.name, columns)
    for name in options.subjects:
        model, inputs = SUBJECTS[name]()
        exact = output(model, inputs)

        def change(found: Tensor, exact: Tensor = exact) -> float:
            return float((found - exact).norm() / exact.norm())

        bf16 = change(output(model, inputs, autocast=True))
        for unit in ("block", "branch"):
            converted = [revify.convert(model, inputs[:2], bits=bits, unit=unit) for bits in BITS]
            changes = [change(output(form, inputs)) for form in converted]
            results.row(name, unit, bf16, *changes)
            results.target(f"{name}, {unit}: change at 8 bits / that of bf16 autocast", changes[0] / bf16, 1.0)
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
