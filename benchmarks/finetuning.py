"""Fine-tuning from pretrained weights at one budget: plain, checkpointed, converted, rewired (Re2TAL), BDIA.

    python benchmarks/finetuning.py [--depth 20] [--images 3000] [--epochs 2] [--seeds 0 1 2] [--test 2000]

CIFAR-10 ResNets of ../shared/data on the first training images, random crops and mirror images, SGD with momentum and a
cosine schedule. Accuracy converted and after `revert`, memory of one step, median step time over the run (the runs are
made one after the other, so compare times with care). Writes benchmarks/results/finetuning.csv and .txt.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import timm.scheduler
import torch
from common import Results
from fidelity import accuracy
from pretrained import cifar10, cifar_resnet
from torch import Tensor, nn
from torch.nn import functional

import revify
from revify.counting import count_memory
from revify.measuring import checkpoint_blocks


def checkpointed(model: nn.Module, images: Tensor) -> nn.Module:
    """The plain model with per-block checkpointing."""
    checkpoint_blocks(model, revify.plan(model, images[:2]))
    return model


def converted(predictor: str, bits: int) -> Callable[[nn.Module, Tensor], nn.Module]:
    """A calibrated conversion."""
    return lambda model, images: revify.calibrate(
        revify.convert(model, images[:2], grid=10), images, predictor=predictor, bits=bits
    )


METHODS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "plain": lambda model, images: model,
    "checkpointed": checkpointed,
    "linear_z, 0 bits": converted("linear_z", 0),
    "linear_z, 1 bit": converted("linear_z", 1),
    "linear_z, 2 bits": converted("linear_z", 2),
    "diagonal, 2 bits": converted("diagonal", 2),
    "rewired (Re2TAL)": lambda model, images: revify.convert(model, images[:2], predictor="identity", bits=0, grid=8),
    "BDIA": lambda model, images: revify.convert(
        model, images[:2], predictor="midpoint", bits=1, grid=8, random_sign=True
    ),
}


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror images at random and crops of the images padded by 4."""
    flips = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
    return functional.pad(images, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]


def finetune(model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int, batch: int, lr: float) -> float:
    """Train in place; returns the median seconds of a step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = epochs * (len(images) // batch)
    schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    model.train()
    seconds, step = [], 0
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // batch * batch].split(batch):
            start = time.perf_counter()
            loss = functional.cross_entropy(model(augmented(images[rows], generator)), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            schedule.step_update(step)
            seconds.append(time.perf_counter() - start)
    model.eval()
    return statistics.median(seconds)


def peak(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """MiB above what is resident, in one step."""
    model.train()

    def forward() -> Tensor:
        return functional.cross_entropy(model(images), labels)

    forward().backward()
    return count_memory(forward, images.device).peak / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="finetuning")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = {"method": 18, "seed": 4, "accuracy": 8, "reverted": 8, "peak MiB": 8, "step s": 8}
    results = Results(args.name, columns)
    images, labels = cifar10("train", args.images)
    test, test_labels = cifar10("test", args.test)
    results.row("before", "–", accuracy(cifar_resnet(args.depth), test, test_labels), "–", "–", "–")
    for seed in args.seeds:
        for method in args.methods:
            model = METHODS[method](cifar_resnet(args.depth), images[:256])
            seconds = finetune(model, images, labels, seed, args.epochs, args.batch, args.lr)
            score = accuracy(model, test, test_labels)
            plain = revify.revert(model).eval() if hasattr(model, "revify_plan") else model
            reverted = accuracy(plain, test, test_labels)
            memory = peak(model, images[: args.batch], labels[: args.batch])
            results.row(method, seed, score, reverted, memory, seconds)
    summarise(results, args.methods)
    return results.write()


def summarise(results: Results, methods: list[str]) -> None:
    """Means over the seeds, in points of accuracy away from plain fine-tuning."""

    def mean(method: str, column: str) -> float:
        return statistics.mean(row[column] for row in results.rows if row["method"] == method)

    for method in methods:
        results.say(
            f"{method:18}  converted {100 * mean(method, 'accuracy'):.2f} % "
            f"({100 * (mean(method, 'accuracy') - mean('plain', 'accuracy')):+.2f} of plain), "
            f"reverted {100 * mean(method, 'reverted'):.2f} % "
            f"({100 * (mean(method, 'reverted') - mean('plain', 'accuracy')):+.2f}), "
            f"peak {mean(method, 'peak MiB'):.1f} MiB, step {mean(method, 'step s') / mean('plain', 'step s'):.2f}× plain"
        )


if __name__ == "__main__":
    sys.exit(main())
