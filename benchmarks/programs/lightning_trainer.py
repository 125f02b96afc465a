"""Lightning's Trainer: precisions, accumulation, clipping, weight averaging, a resumed run.

python benchmarks/programs/lightning_trainer.py
"""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from comparing import Outcome, batches, converted, main, state
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from timm import create_model
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Classifier(lightning.LightningModule):
    """A network with its loss and its optimizer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        self.log("validation", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def train(*, averages: bool = False, resume: bool = False, **arguments: Any) -> Outcome:
    """Two epochs, with a break between them where it is to be resumed."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def made() -> Classifier:
        torch.manual_seed(0)
        network = create_model("test_vit", num_classes=5, depth=4, proj_drop_rate=0.1)
        return Classifier(converted(network, torch.zeros(2, 3, 160, 160)))

    model = made()
    before = state(model, "before ")
    loader = DataLoader([(x[0], y[0]) for x, y in batches(8, 1, 3, 160, 160)], batch_size=2)
    callbacks: list[Callback] = [StochasticWeightAveraging(1e-2, swa_epoch_start=1)] if averages else []
    shared = dict(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, num_sanity_val_steps=1, **arguments,
    )  # fmt: skip
    trainer = lightning.Trainer(max_epochs=1 if resume else 2, **shared)
    trainer.fit(model, loader, loader)
    if resume:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "last.ckpt")
            trainer.save_checkpoint(path)
            model = made()
            trainer = lightning.Trainer(max_epochs=2, **shared)
            trainer.fit(model, loader, loader, ckpt_path=path, weights_only=False)
    return before | state(model) | {"validation": trainer.callback_metrics["validation"]}


SETTINGS = {
    "fp32": train,
    "bf16-mixed": partial(train, precision="bf16-mixed"),
    "bf16-true": partial(train, precision="bf16-true"),
    "accumulation over 2 batches": partial(train, accumulate_grad_batches=2),
    "clipping by norm": partial(train, gradient_clip_val=0.1),
    "clipping by value, bf16-mixed": partial(
        train, gradient_clip_val=0.01, gradient_clip_algorithm="value", precision="bf16-mixed"
    ),
    "stochastic weight averaging": partial(train, averages=True),
    "resumed": partial(train, resume=True),
}

if __name__ == "__main__":
    main("Lightning's Trainer", SETTINGS)
