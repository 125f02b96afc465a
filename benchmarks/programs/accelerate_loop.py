"""Accelerate's loop: one process with bf16, accumulation, saved and loaded states, and two processes.

python benchmarks/programs/accelerate_loop.py
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from comparing import Outcome, batches, compared, converted, group, main, run, show, state
from timm import create_model
from torch import nn
from torch.utils.data import DataLoader

PROCESSES = 2
PROGRAM = "Accelerate"


def train(*, saved: bool = False, **options: Any) -> Outcome:
    """Two epochs of the loop in its documentation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = converted(create_model("test_vit", num_classes=5, depth=4), torch.zeros(2, 3, 160, 160))
    before = state(model, "before ")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rows = [(x[0], y[0]) for x, y in batches(8, 1, 3, 160, 160)]
    loader = DataLoader(rows, batch_size=4 // accelerator.num_processes)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for epoch in range(2):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if saved and epoch == 0:
            with tempfile.TemporaryDirectory() as folder:
                accelerator.save_state(folder)
                with torch.no_grad():
                    next(model.parameters()).zero_()
                accelerator.load_state(folder)
    return before | state(accelerator.unwrap_model(model))


SETTINGS = {
    "one process": train,
    "one process, bf16, accumulation": partial(train, mixed_precision="bf16", gradient_accumulation_steps=2),
    "one process, saved and loaded": partial(train, saved=True),
}
TOGETHER = {"two processes": train, "two processes, bf16": partial(train, mixed_precision="bf16")}


def work(rank: int, address: str) -> None:
    """What each of two processes does."""
    warnings.filterwarnings("ignore")
    with group(rank, PROCESSES, address):
        for name, setting in TOGETHER.items():
            found, expected = (run(setting, plain=plain) for plain in (False, True))
            if rank == 0:
                show(compared(PROGRAM, name, found, expected))


if __name__ == "__main__":
    main(PROGRAM, SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (str(Path(folder, "group")),), PROCESSES)
