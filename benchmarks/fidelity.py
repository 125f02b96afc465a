"""How far conversion alone changes pretrained networks: accuracy or cosine over bits × predictor, without training.

    python benchmarks/fidelity.py [--models resnet20 resnet56 vit_small] [--calibrate 256] [--test 1000] [--bits 0 1 2 3]

Calibration images come from the training split, the figures from the test split (CIFAR-10) or the validation photos
(flowers). "identity" has the balanced signs of γ that are its default, "identity +" always γ > 0. The ridge of the fits
has no lower limit here (--ridge 0): it is the present network that counts. Writes benchmarks/results/NAME.csv and .txt.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from common import RESULTS, Results
from pretrained import cifar10, cifar_resnet, flowers, vit_small
from torch import Tensor, nn

import revify
from revify.words import CALIBRATED, FIXED

PREDICTORS = (*FIXED, "identity +", *CALIBRATED, "auto")


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1, 0…1."""
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(250)])
    return float((found == labels).double().mean())


def cosine(model: nn.Module, images: Tensor, wanted: Tensor) -> float:
    """Mean cosine of the CLS feature to the original's."""
    with torch.no_grad():
        found = torch.cat([model(part) for part in images.split(25)])
    return float(torch.cosine_similarity(found, wanted).mean())


def subject(name: str, calibrate: int, test: int) -> tuple[nn.Module, Tensor, Callable[[nn.Module], float]]:
    """The network, its calibration images and its score."""
    if name == "vit_small":
        model, images = vit_small(), flowers("val")[0][:test]
        with torch.no_grad():
            wanted = torch.cat([model(part) for part in images.split(25)])
        photos = flowers("train")[0]
        photos = torch.cat([photos, photos.flip(3)])  # mirror images are as good
        chosen = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))[:calibrate]
        return model, photos[chosen], lambda m: cosine(m, images, wanted)
    model = cifar_resnet(int(name.removeprefix("resnet")))
    images, labels = cifar10("test", test)
    return model, cifar10("train", calibrate)[0], lambda m: accuracy(m, images, labels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56", "vit_small"])
    parser.add_argument("--predictors", nargs="+", default=list(PREDICTORS))
    parser.add_argument("--bits", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--tolerances", nargs="*", type=float, default=[], help='also bits="auto" with each of these')
    parser.add_argument("--calibrate", type=int, default=256, help="calibration images")
    parser.add_argument("--ridge", type=float, default=0.0, help="least ridge of the fits")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="fidelity", help="of the result file")
    parser.add_argument("--picture", action="store_true", help="also draw results/NAME.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = {"model": 10, "predictor": 10, "form": 10, "bits": 4, "score": 8, "of original": 11, "seconds": 7}
    results = Results(args.name, columns)
    for name in args.models:
        model, images, score = subject(name, args.calibrate, args.test)
        original = score(model)
        results.row(name, "–", "original", "–", original, 1.0, 0)
        for predictor in args.predictors:
            kind = predictor.removesuffix(" +")
            fitted = kind not in FIXED
            for asked in [*args.bits, *(args.tolerances if fitted else [])]:
                bits = asked if isinstance(asked, int) else 0
                start = time.perf_counter()
                sign = None if kind == predictor else "positive"
                converted = revify.convert(
                    model, images[:2], predictor="identity" if fitted else kind, bits=bits, sign=sign, grid=10
                )
                if fitted:
                    free = {"bits": "auto", "tolerance": asked} if asked is not bits else {"bits": bits}
                    converted = revify.calibrate(converted, images, predictor=predictor, ridge=args.ridge, **free)
                seconds = time.perf_counter() - start
                try:
                    value = score(converted.eval())
                except revify.GridRangeError:
                    value = float("nan")  # the stream ran away: no function is left to measure
                form = converted.revify_plan.stages[-1].predictor
                coupled = [b for stage in converted.revify_plan.stages for b in stage.step_bits[1:]]
                mean = sum(coupled) / len(coupled)
                results.row(name, predictor, form, mean, value, value / original, round(seconds))
                results.write()
    if args.picture:
        draw(results, args.models)
    return results.write()


def draw(results: Results, models: list[str]) -> None:
    """A panel for each network: the score over the bits, as a share of the original's, a line for each predictor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(models), 4), layout="constrained")
    for place, model in enumerate(models, 1):
        axes = figure.add_subplot(1, len(models), place, title=model, xlabel="residue bits", ylabel="of the original")
        rows = [row for row in results.rows if row["model"] == model and row["predictor"] != "–"]
        for predictor in dict.fromkeys(row["predictor"] for row in rows):
            points = sorted((row["bits"], row["of original"]) for row in rows if row["predictor"] == predictor)
            axes.plot(*zip(*points, strict=True), marker="o", label=predictor, linewidth=1)
        axes.legend(fontsize="small")
    figure.savefig(RESULTS / f"{results.name}.png", dpi=100)


if __name__ == "__main__":
    sys.exit(main())
