"""Networks whose blocks add almost nothing at first (LayerScale 1e-6), from scratch: does the grid let them train?

    python benchmarks/small_updates.py [--epochs 6] [--images 2000] [--seeds 0 1 2] [--threads 1]

Small versions of timm's ConvNeXt and DeiT III, on CIFAR-10 images of ../shared/data. For each: the plain model, and
converted on the default grid of 2^-12 and on the one that grid="auto" chooses. First, of the untrained model: how much of
the update of the plain model's median block is left, |z' − z − u| / |u| for its update u; 1 says that the grid rounds it
away. Then the mean training loss of the last epoch and the accuracy on test images. AdamW, one seed for all three.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from common import Results
from fidelity import accuracy
from pretrained import cifar10
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

import revify

BATCH = 50
SMALL = 1e-6  # LayerScale of convnext_tiny and deit3_small


def convnext() -> nn.Module:
    return ConvNeXt(
        in_chans=3, num_classes=10, depths=(2, 2, 6, 2), dims=(16, 32, 48, 64), patch_size=2, ls_init_value=SMALL
    )


def deit3() -> nn.Module:
    return VisionTransformer(
        img_size=32,
        patch_size=4,
        num_classes=10,
        embed_dim=48,
        depth=8,
        num_heads=3,
        init_values=SMALL,
        no_embed_class=True,
    )


def lost(model: nn.Module, converted: nn.Module, images: Tensor) -> float:
    """How much of the median block's update is lost, relative to it."""
    plan: revify.Plan = converted.revify_plan
    losses = []
    with torch.no_grad():
        for stage in plan.stages:
            grid = plan.grid_of(stage)
            for planned in stage.blocks:
                block, given = model.get_submodule(planned.path), []
                handle = block.register_forward_hook(lambda module, args, output: given.append(args[0]))  # noqa: B023
                model(images)
                handle.remove()
                z = grid.round(given[0])
                t = block(z.to(given[0].dtype)).double()
                update = t - z
                losses.append(float((grid.round(t).double() - z - update).norm() / update.norm()))
    return statistics.median(losses)


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int) -> float:
    """The mean loss of the last epoch."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * (len(images) // BATCH))
    model.train()
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            loss = functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    model.eval()
    return statistics.mean(losses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = {"network": 9, "grid": 6, "seed": 4, "of the update lost": 18, "training loss": 13, "accuracy": 8}
    results = Results("small_updates", columns)
    images, labels = cifar10("train", args.images)
    test = cifar10("test", 1000)
    gaps: dict[str, list[float]] = {}
    for name, create in {"ConvNeXt": convnext, "DeiT III": deit3}.items():
        for seed in args.seeds:
            losses = {}
            for grid in ("plain", 12, "auto"):
                torch.manual_seed(seed)
                model = create()
                share: float | str = "–"
                if grid != "plain":
                    plain = model
                    model = revify.convert(plain, images[:8], grid=grid, step="recurrence")
                    share = lost(plain, model, images[:8])
                losses[grid] = train(model, images, labels, seed, args.epochs)
                shown = (
                    grid
                    if grid == "plain"
                    else f"2^-{model.revify_plan.grid_of(model.revify_plan.stages[0]).resolution}"
                )
                results.row(name, shown, seed, share, losses[grid], accuracy(model, *test))
            gaps.setdefault(name, []).append(losses["auto"] - losses["plain"])
            results.write()
    for name, found in gaps.items():
        results.target(f"{name}: training loss above the plain model's, mean", statistics.mean(found), 0.05)
    return results.write()


if __name__ == "__main__":
    sys.exit(main())
