"""Fine-tuning from pretrained weights at one budget: plain, checkpointed, converted, rewired (Re2TAL), BDIA.

    python benchmarks/finetuning.py [--subjects resnet20 resnet56 vit_small] [--seeds 0 1 2] [--threads 2]

CIFAR-10 ResNets of ../shared/data learn images that were stored as poor JPEG files, on which they are some twenty points
worse at first; the ViT-S learns five kinds of flowers; text and convnext are those of subjects.py. Every method sees the
same images in the same order for each seed.
Arrows are schedules: the predictors are fitted again on the way, with other bits; at 4 bits the model is nearly the plain
one, so that little changes when it is reverted. Accuracy converted and after `revert`; memory of one step (exact); the
median step time (of runs one after the other, so compare with care).
Writes benchmarks/results/finetuning.csv and .txt after every run.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import subjects
import timm.scheduler
import torch
from common import RESULTS, Results
from PIL import Image
from pretrained import MEAN, STD, cifar10, cifar_resnet, flowers, normalised, vit_small
from torch import Tensor, nn
from torch.nn import functional

import revify
from revify.calibration.settling import RIDGE
from revify.measuring.measuring import checkpoint_blocks
from revify.measuring.memory import count_memory


@dataclass(frozen=True)
class Subject:
    """A network and what it is to learn.

    Args:
        create: a fresh copy with its pretrained weights, in eval mode.
        train: images and labels.
        test: likewise.
        augment: (images, generator) → images.
        optimizer: for a model.
        calibrate: images to fit predictors on.
        epochs: over the training images.
        batch: images per step.
    """

    create: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    augment: Callable[[Tensor, torch.Generator], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    calibrate: int = 256
    epochs: int = 3
    batch: int = 64


@dataclass(frozen=True)
class Method:
    """How a model is prepared for training.

    Args:
        predictor: None leaves it plain.
        bits: residue bits; "auto" for the fewest in each block that keep the output within the tolerance.
        refits: (share of the steps, bits): when the predictors are fitted again, and the bits from then on.
        sign: of γ.
        checkpointed: the plain model with per-block checkpointing.
        grid: resolution; what blows up needs room, which a coarser grid has.
        tolerance: relative error of the output, for "auto" bits.
        ridge: the least one of the fits.
        coded: updates coded in so many bits, which need no predictor.
    """

    predictor: str | None = None
    bits: int | str = 0
    refits: tuple[tuple[float, int], ...] = ()
    sign: str | None = None
    checkpointed: bool = False
    grid: int = 10
    tolerance: float = 0.2
    ridge: float = RIDGE
    coded: bool = False

    def prepare(self, subject: Subject) -> nn.Module:
        """The model to train."""
        model, images = subject.create(), subject.train[0]
        if self.checkpointed:
            checkpoint_blocks(model, revify.plan(model, images[:2]))
        if self.coded:
            return revify.convert(model, images[:2], bits=int(self.bits))
        if self.predictor is None:
            return model
        if self.predictor not in CALIBRATED:
            return revify.convert(
                model,
                images[:2],
                predictor=self.predictor,
                bits=int(self.bits),
                grid=self.grid,
                sign=self.sign,
            )
        return self.refit(revify.convert(model, images[:2], grid=self.grid, sign=self.sign), subject, self.bits)

    def refit(self, model: nn.Module, subject: Subject, bits: int | str) -> nn.Module:
        """The model with predictors fitted to its present weights."""
        images = subject.train[0][: subject.calibrate]
        predictor = self.predictor or "auto"
        return revify.calibrate(
            model, images, predictor=predictor, bits=bits, tolerance=self.tolerance, ridge=self.ridge
        )


CALIBRATED = ("linear", "diagonal", "auto")
METHODS = {
    "plain": Method(),
    "checkpointed": Method(checkpointed=True),
    "coded, 8 bits": Method(bits=8, coded=True),
    "coded, 6 bits": Method(bits=6, coded=True),
    "coded, 4 bits": Method(bits=4, coded=True),
    "identity, 4 bits": Method("identity", 4, sign="balanced"),
    "identity, 3 bits": Method("identity", 3, sign="balanced"),
    "linear, 2 bits": Method("linear", 2),
    "linear, ±, 2 bits": Method("linear", 2, sign="random"),
    "linear, 2 → 4 bits": Method("linear", 2, refits=((0.8, 4),)),
    "linear, 1 bit": Method("linear", 1),
    "linear, 0 bits": Method("linear", 0),
    "linear, 0 → 4 bits": Method("linear", 0, refits=((0.5, 4),)),
    "rewired (Re2TAL)": Method("identity", 0, grid=6, sign="positive"),
    "BDIA": Method("midpoint", 1, sign="random", grid=6),
}
OTHERS = {  # only where they are asked for
    "identity +, 4 bits": Method("identity", 4, sign="positive"),
    "identity, 2 bits": Method("identity", 2, sign="balanced"),
    "linear, 1 → 4 bits": Method("linear", 1, refits=((0.8, 4),)),
    "linear, 2 → 2 bits": Method("linear", 2, refits=((0.8, 2),)),
    "linear, ±, 1 bit": Method("linear", 1, sign="random"),
    "linear, ±, 0 bits": Method("linear", 0, sign="random"),
    "diagonal, 2 bits": Method("diagonal", 2),
    "auto, 5 %": Method("auto", "auto", tolerance=0.05),
    "linear, auto bits": Method("linear", "auto"),
    "linear, auto → 4 bits": Method("linear", "auto", refits=((0.5, 4),)),
    "linear, 0 → 0 → 4": Method("linear", 0, refits=((0.15, 0), (0.3, 0), (0.5, 4))),
    "linear, 4 → 0 bits": Method("linear", 4, refits=((0.5, 0),)),
}
KNOWN = {**METHODS, **OTHERS}
UNLIMITED = {
    f"{key}, ridge 0": replace(method, ridge=0.0) for key, method in KNOWN.items() if method.predictor in CALIBRATED
}
EVERY = {**KNOWN, **UNLIMITED}


def as_jpeg(images: Tensor, quality: int) -> Tensor:
    """Normalised images after they were stored as JPEG files."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    stored = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        stored.append(torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8))
    return normalised(torch.stack(stored).view(pixels.shape).permute(0, 3, 1, 2) / 255)


def crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror images at random, and a crop of the images padded by 4."""
    images = mirrored(images, generator)
    size = images.shape[-1]
    top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
    return functional.pad(images, (4, 4, 4, 4))[:, :, top : top + size, left : left + size]


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror images at random."""
    flips = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flips[:, None, None, None], images.flip(3), images)


@cache
def cifar_jpeg(split: str, count: int) -> tuple[Tensor, Tensor]:
    """CIFAR-10 with JPEG's traces."""
    images, labels = cifar10(split, count)
    return as_jpeg(images, 20), labels


def cifar_subject(depth: int, images: int, test: int) -> Subject:
    """A CIFAR-10 ResNet on JPEG images."""
    return Subject(
        create=lambda: cifar_resnet(depth),
        train=cifar_jpeg("train", images),
        test=cifar_jpeg("test", test),
        augment=crops,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True),
    )


def vit_subject(size: int = 70) -> Subject:
    """The ViT-S with a fresh head on flowers: 500 of the training photos train, the others and "val" are the test."""
    photos, kinds = flowers("train", size)
    more, more_kinds = flowers("val", size)
    train = torch.arange(len(photos)) % 8 < 5

    def create() -> nn.Module:
        torch.manual_seed(0)
        model = vit_small()
        model.reset_classifier(5)
        return model.eval()

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for n, p in model.named_parameters() if n.startswith("head") == head], "lr": lr}
            for head, lr in ((True, 3e-3), (False, 2.5e-5))
        ]
        return torch.optim.AdamW(groups, weight_decay=0.05)

    return Subject(
        create=create,
        train=(photos[train], kinds[train]),
        test=(torch.cat([photos[~train], more]), torch.cat([kinds[~train], more_kinds])),
        augment=crops,
        optimizer=optimizer,
        epochs=5,
        batch=20,
    )


def text_subject() -> Subject:
    """The transformer of subjects.py on Python's help."""
    train, test = subjects.help_pages()
    return Subject(
        create=subjects.reader,
        train=train,
        test=test,
        augment=lambda texts, _: texts,
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=3e-4, weight_decay=0.05),
        batch=16,
        epochs=2,
    )


def convnext_subject() -> Subject:
    """The ConvNeXt of subjects.py on JPEG images."""
    clean = cifar10("train", 10_000)
    return Subject(
        create=lambda: subjects.convnext(*clean),
        train=cifar_jpeg("train", 4000),
        test=cifar_jpeg("test", 2500),
        augment=crops,
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=5e-4, weight_decay=0.05),
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "resnet20": lambda: cifar_subject(20, 4000, 5000),
    "resnet56": lambda: replace(cifar_subject(56, 1920, 2500), epochs=2),
    "vit_small": vit_subject,
    "text": text_subject,
    "convnext": convnext_subject,
}


def finetune(model: nn.Module, method: Method, subject: Subject, seed: int) -> tuple[nn.Module, float]:
    """The trained model, and the median seconds of a step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = subject.optimizer(model)
    images, labels = subject.train
    steps = subject.epochs * (len(images) // subject.batch)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=steps, t_in_epochs=False, warmup_t=steps // 10, warmup_lr_init=1e-6
    )
    schedule.step_update(0)
    model.train()
    seconds: list[float] = []
    for _ in range(subject.epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // subject.batch * subject.batch].split(subject.batch):
            for share, bits in method.refits:
                if len(seconds) == int(share * steps):
                    model = method.refit(model, subject, bits).train()
            start = time.perf_counter()
            logits = model(subject.augment(images[rows], generator))
            loss = functional.cross_entropy(logits, labels[rows].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
            schedule.step_update(len(seconds))
    return model.eval(), statistics.median(seconds)


def peak(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """MiB above what is resident, in one step."""
    model.train()

    def forward() -> Tensor:
        return functional.cross_entropy(model(images), labels.flatten())

    forward().backward()
    return count_memory(forward, images.device).peak / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=EVERY)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="finetuning", help="of the result files")
    parser.add_argument("--resume", action="store_true", help="keep the rows of results/NAME.csv, run what is missing")
    parser.add_argument("--picture", action="store_true", help="also draw results/NAME.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scores = ("accuracy", "reverted", "loss", "lossrev", "peak MiB", "step s")
    columns = {"network": 9, "method": 28, "seed": 4, **dict.fromkeys(scores, 8)}
    kept = Results.read(args.name) if args.resume else []
    results = Results(args.name, columns)
    for name in args.subjects:
        subject = SUBJECTS[name]()
        memory = cache(partial(step_memory, subject))
        own = [row for row in kept if row["network"] == name and row["method"] in EVERY]
        results.row(name, "before", "–", *judge(subject.create(), subject)[:1], *["–"] * 5)
        for row in own:
            results.row(*({**row, "peak MiB": memory(row["method"])}.get(column, "–") for column in columns))
        done = {(row["method"], row["seed"]) for row in own}
        for seed, method in product(args.seeds, args.methods):
            if (method, seed) not in done:
                run(results, name, method, subject, seed, memory(method))
                results.write()
        summarise(results, name, args.methods)
    if args.picture:
        draw(results, args.methods)
    return results.write()


def run(results: Results, name: str, key: str, subject: Subject, seed: int, memory: float) -> None:
    """One training run as a row."""
    method = EVERY[key]
    try:
        model, seconds = finetune(method.prepare(subject), method, subject, seed)
        trained = judge(model, subject)
    except revify.GridRangeError:  # the stream ran away: there is no function left
        results.row(name, key, seed, *[float("nan")] * 4, memory, float("nan"))
        return
    converted = hasattr(model, "revify_plan")
    reverted = judge(revify.revert(model).eval(), subject) if converted else trained
    results.row(name, key, seed, trained[0], reverted[0], trained[1], reverted[1], memory, seconds)


def judge(model: nn.Module, subject: Subject) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on the test images."""
    images, labels = subject.test
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(250)])
    found = (logits.argmax(1) == labels.flatten()).double().mean()
    return float(found), float(functional.cross_entropy(logits, labels.flatten()))


def step_memory(subject: Subject, key: str) -> float:
    """MiB above what is resident in one step: the same for every seed."""
    few = replace(subject, calibrate=subject.batch)  # what the predictors hold does not depend on the images
    model = EVERY[key].prepare(few)
    for _, bits in EVERY[key].refits:
        model = EVERY[key].refit(model, few, bits)
    return peak(model, *(part[: subject.batch] for part in subject.train))


def summarise(results: Results, name: str, methods: list[str]) -> None:
    """Means over the seeds, and points of accuracy away from plain fine-tuning with the same seeds, ± standard error."""

    def values(method: str, column: str) -> dict[int, float]:
        rows = [row for row in results.rows if (row["network"], row["method"]) == (name, method)]
        return {row["seed"]: row[column] for row in rows if isinstance(row[column], float)}

    def away(method: str, column: str, scale: float = 100) -> str:
        plain, own = values("plain", column), values(method, column)
        points = [scale * (own[seed] - plain[seed]) for seed in own if seed in plain]
        if not points:
            return "–"
        spread = f" ± {statistics.stdev(points) / len(points) ** 0.5:.2g}" if len(points) > 1 else ""
        return f"{statistics.mean(points):+.3g}{spread}"

    results.say(f"\n{name}, means over the seeds; points against plain with the same seeds, ± standard error:")
    for method in methods:
        own = {column: values(method, column) for column in ("accuracy", "reverted", "peak MiB", "step s")}
        if not own["accuracy"]:
            continue
        mean = {column: statistics.mean(found.values()) for column, found in own.items()}
        ratio = (
            mean["step s"] / statistics.mean(values("plain", "step s").values()) if values("plain", "step s") else None
        )
        results.say(
            f"{method:28}  {len(own['accuracy'])} seed{'s' * (len(own['accuracy']) > 1)}: "
            f"converted {100 * mean['accuracy']:.2f} % ({away(method, 'accuracy')}), "
            f"reverted {100 * mean['reverted']:.2f} % ({away(method, 'reverted')}), "
            f"loss {away(method, 'loss', 1)}, {away(method, 'lossrev', 1)}, peak {mean['peak MiB']:.1f} MiB"
            + (f", step {ratio:.2f}×" if ratio else "")
        )
    results.say("")


def draw(results: Results, methods: list[str]) -> None:
    """A panel for each network: accuracy converted and reverted over the methods, a dot for each seed."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in results.rows))
    figure = Figure(figsize=(4.5 * len(networks), 4.5), layout="constrained")
    for place, network in enumerate(networks, 1):
        axes = figure.add_subplot(1, len(networks), place, title=network, ylabel="test accuracy, %")
        for column, mark, colour in (("accuracy", "o", "tab:blue"), ("reverted", "x", "tab:orange")):
            rows = [row for row in results.rows if row["network"] == network and row["method"] in methods]
            axes.scatter(
                [methods.index(row["method"]) for row in rows],
                [100 * row[column] for row in rows],
                marker=mark,
                color=colour,
                label="as trained" if column == "accuracy" else "reverted",
            )
        axes.set_xticks(range(len(methods)), methods, rotation=60, ha="right")
        axes.legend()
    figure.savefig(RESULTS / f"{results.name}.png", dpi=100)


if __name__ == "__main__":
    sys.exit(main())
