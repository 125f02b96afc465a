"""RevNet-38 against ResNet-32 from scratch on CIFAR-10 at one budget, and the memory of RevNet-110 and ResNet-110.

    python benchmarks/from_scratch.py [--epochs 8] [--images 10000] [--seeds 0 1] [--threads 2]

Networks of examples/revnets.py. Accuracy on the 5,000 test images of ../shared/data after training on the first training
images: crops, mirror images, SGD with momentum, one cycle of a cosine. Memory is of one step at batch 64, exact: peak, and
held between forward and backward; the time is the median of alternating steps, as a ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import timm.scheduler
import torch
from common import Results
from fidelity import accuracy
from finetuning import crops
from pretrained import cifar10
from torch import Tensor, nn
from torch.nn import functional

from revify.measuring.memory import Memory, count_memory

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from revnets import count, resnet, revnet  # of the examples, which are no package

BATCH = 64
NINTH = 1 / 9  # of ResNet-110's activation memory: MemCNN's published 9.5 times


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int) -> None:
    """SGD, learning rate .1 after a warm-up of one epoch, to 0 on a cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    steps = len(images) // BATCH
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=epochs * steps, t_in_epochs=False, warmup_t=steps, warmup_lr_init=0.01
    )
    model.train()
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator)[: steps * BATCH].split(BATCH):
            schedule.step_update(step)
            functional.cross_entropy(model(crops(images[rows], generator)), labels[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    model.eval()


def memory(model: nn.Module, images: Tensor, labels: Tensor) -> Memory:
    """Of a second step: the first one allocates the gradients."""

    def forward() -> Tensor:
        return functional.cross_entropy(model.train()(images), labels)

    forward().backward()
    return count_memory(forward, images.device)


def step_ratio(model: nn.Module, rival: nn.Module, images: Tensor, labels: Tensor, repeats: int = 5) -> float:
    """Seconds of a step of the model / of the rival: median over alternating pairs."""
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for place, form in enumerate((model, rival)):
            start = time.perf_counter()
            functional.cross_entropy(form.train()(images), labels).backward()
            times[place].append(time.perf_counter() - start)
    return statistics.median(a / b for a, b in zip(times[0][1:], times[1][1:], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = {"network": 10, "parameters M": 12, "peak MiB": 8, "held MiB": 8, "seed": 4, "accuracy": 8}
    results = Results("from_scratch", columns)
    images, labels = cifar10("train", args.images)
    test = cifar10("test", 5000)
    batch = images[:BATCH], labels[:BATCH]
    held: dict[str, Memory] = {}
    forms = {
        "ResNet-110": (resnet, 110),
        "RevNet-110": (revnet, 110),
        "ResNet-164": (resnet, 164),
        "RevNet-164": (revnet, 164),
    }
    for name, (create, depth) in forms.items():
        torch.manual_seed(0)
        model = create(depth)
        held[name] = memory(model, *batch)
        results.row(name, count(model), held[name].peak / 2**20, held[name].held / 2**20, "–", "–")
    scores: dict[str, list[float]] = {"ResNet-32": [], "RevNet-38": []}
    for seed in args.seeds:
        for name, (create, depth) in {"ResNet-32": (resnet, 32), "RevNet-38": (revnet, 38)}.items():
            torch.manual_seed(seed)
            model = create(depth)
            found = held[name] = memory(model, *batch)
            train(model, images, labels, seed, args.epochs)
            scores[name].append(accuracy(model, *test))
            results.row(name, count(model), found.peak / 2**20, found.held / 2**20, seed, scores[name][-1])
            results.write()
    torch.manual_seed(0)
    results.say(f"\nstep time RevNet-38 / ResNet-32: {step_ratio(revnet(38), resnet(32), *batch):.2f}")
    results.say(f"step time RevNet-110 / ResNet-110: {step_ratio(revnet(110), resnet(110), *batch):.2f}")
    loss = statistics.mean(scores["ResNet-32"]) - statistics.mean(scores["RevNet-38"])
    results.target("mean accuracy of ResNet-32 above RevNet-38's", loss, 0.01)
    results.target("peak RevNet-110 / ResNet-110", held["RevNet-110"].peak / held["ResNet-110"].peak, NINTH)
    results.target("held RevNet-110 / ResNet-110", held["RevNet-110"].held / held["ResNet-110"].held, NINTH)
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
