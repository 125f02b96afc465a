"""Thousands of training steps of one converted model: does anything grow, and are the gradients still the same bits at the end?

A small ViT with dropout and drop-path is trained with AdamW on random images. At every hundredth step the gradients are
compared with those of ordinary autograd on the same model (`revify.plain_backward`) from the same random numbers, and the
process's memory, live tensors and live objects of revify are counted after a garbage collection. After the first tenth of the
steps none of these may grow.

Exit status 1 if a gradient differs or a count grows.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import timm
import torch
from common import Results
from torch import Tensor, nn

import revify


def step(model: nn.Module, images: Tensor, targets: Tensor, seed: int) -> list[Tensor]:
    """The gradients of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    nn.functional.cross_entropy(model(images), targets).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def counts() -> tuple[int, int, int]:
    """Resident KiB, live tensors, live objects of revify's classes."""
    gc.collect()
    held = gc.get_objects()
    tensors = sum(isinstance(item, Tensor) for item in held)
    own = sum(str(type(item).__module__).partition(".")[0] == "revify" for item in held)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]), tensors, own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=0.1, proj_drop_rate=0.1)
    model = revify.convert(plain, bits=options.bits).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    numbers = torch.Generator().manual_seed(1)
    results = Results("soak", {"step": 6, "loss": 8, "same": 5, "KiB": 9, "tensors": 8, "objects": 8})
    different, first = 0, None
    for number in range(1, options.steps + 1):
        images = torch.randn(4, 3, 32, 32, generator=numbers)
        targets = torch.randint(10, (4,), generator=numbers)
        found = step(model, images, targets, number)
        if number % 100 == 0:
            kept = [gradient.clone() for gradient in found]
            with revify.plain_backward():
                expected = step(model, images, targets, number)
            equal = all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
            different += not equal
            with torch.no_grad():
                loss = nn.functional.cross_entropy(model(images), targets).item()
            del kept, expected, found
            now = counts()
            if number >= options.steps / 10 and first is None:
                first = now
            results.row(number, loss, "yes" if equal else "NO", *now)
        optimizer.step()
    assert first is not None
    results.target("steps with other gradients than ordinary autograd's", different, 0)
    results.target("tensors more than after a tenth", now[1] - first[1], 0)
    results.target("objects of revify more than after a tenth", now[2] - first[2], 0)
    results.target("memory, as a ratio to that after a tenth", now[0] / first[0], 1.02)
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
