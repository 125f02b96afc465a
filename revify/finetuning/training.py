"""One form of a model, trained by a recipe: epochs and validation.

Everything random in an epoch depends on the seed, the epoch and the process only, so a run that was cut off
and goes on from the last whole epoch draws the same numbers as one that was not.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from revify.errors import RevifyError
from revify.finetuning.data import ImageData, make_loaders
from revify.finetuning.modes import evaluating
from revify.finetuning.progress import Progress
from revify.finetuning.recipe import Recipe
from revify.finetuning.results import Epoch, best_epoch, write_metrics
from revify.finetuning.states import load_state, publish, save_state, telling_disk_errors
from revify.measuring.memory import count_memory, wait
from revify.writing import place

_SEEDS_PER_EPOCH = 10_007  # more than there are processes, each of which adds its number


@dataclass(frozen=True, slots=True)
class Form:
    """A model to be trained, and how its weights are written.

    Args:
        name: plain, checkpointed or converted.
        model: on the CPU, not wrapped.
        folder: for what is written about it.
        save: (model, path) writes the weights; None keeps none but the state's.
        change: (bits, fit) goes on with other bits, fitting the predictors again or not; None where there are none.
    """

    name: str
    model: nn.Module
    folder: Path
    save: Callable[[nn.Module, Path], None] | None = None
    change: Callable[[int, bool], None] | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """What training works with: the model and its like as Accelerate prepared them."""

    recipe: Recipe
    accelerator: Accelerator
    model: Any  # the model, or Accelerate's wrapper of it
    optimizer: Any
    schedule: Any  # a timm Scheduler, or None
    train: Any
    validation: Any
    mixup: Any  # a timm Mixup, or None
    updates: int  # in an epoch
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass over the training images gave, over all processes but for the seconds."""

    lr: float
    loss: float
    accuracy: float
    step_seconds: float


def train(
    form: Form,
    recipe: Recipe,
    data: ImageData,
    input_size: tuple[int, int, int],
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[Epoch, ...]:
    """Train a form of the model to the recipe's last epoch, from its last state if there is one.

    Args:
        form: the model; its parameters are changed.
        recipe: how.
        data: what on.
        input_size: channels, height and width.
        accelerator: device, precision and processes.
        progress: is told.

    Returns:
        The history, an entry for every epoch.

    Raises:
        RevifyError: a loss that is not finite, a state that does not fit.
        torch.OutOfMemoryError: the device is too small.
    """
    run = _prepare(form, recipe, data, input_size, accelerator)
    try:
        history = load_state(form.folder, accelerator)
        if accelerator.is_main_process:
            with telling_disk_errors(form.folder):
                publish(form.folder)
        accelerator.wait_for_everyone()
        progress.start(form.name, len(history), recipe.epochs, len(run.train))
        if run.schedule:
            run.schedule.step_update(len(history) * run.updates)
        if form.change and (passed := recipe.phases(len(history))):
            form.change(passed[-1], False)  # what was fitted then is in the state
        for epoch in range(len(history), recipe.epochs):
            phase = len(recipe.phases(epoch + 1)) if form.change else 0
            if form.change and phase > len(recipe.phases(epoch)):
                form.change(recipe.phases(epoch + 1)[-1], True)
            set_seed(recipe.seed + (epoch + 1) * _SEEDS_PER_EPOCH, device_specific=True)
            done = _train_epoch(run, epoch, progress)
            loss, accuracy = evaluate(run.model, run.validation, accelerator)
            seconds, peak = done.step_seconds, run.peak_bytes
            history.append(Epoch(epoch + 1, done.lr, done.loss, done.accuracy, loss, accuracy, seconds, peak, phase))
            _write(form, history, accelerator)
            progress.epoch(form.name, history[-1])
    finally:
        progress.stop()
        accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
        accelerator.free_memory()
    return tuple(history)


def evaluate(model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over all processes' images; the modes of all modules stay as they were."""
    losses, hits = [], []
    with evaluating(model), torch.no_grad(), accelerator.autocast():
        for images, targets in _batches(loader):
            output = model(images).float()
            found = cross_entropy(output, targets, reduction="none"), output.argmax(1) == targets
            loss, hit = accelerator.gather_for_metrics(found)
            losses.append(loss)
            hits.append(hit)
    return torch.cat(losses).mean().item(), torch.cat(hits).float().mean().item()


def _prepare(
    form: Form, recipe: Recipe, data: ImageData, input_size: tuple[int, int, int], accelerator: Accelerator
) -> _Run:
    model = form.model.to(accelerator.device).train()
    train, validation = make_loaders(data, recipe, model, input_size)
    mixup = None
    if recipe.mixup > 0 or recipe.cutmix > 0:
        classes = len(data.classes)
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
    try:
        optimizer = create_optimizer_v2(
            model, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise RevifyError(f"timm cannot create the optimizer {recipe.opt!r}: {error}") from error
    peak = _step_memory(model, data, recipe.batch_size, accelerator)
    model, prepared, train, validation = accelerator.prepare(model, optimizer, train, validation)
    if len(train) == 0:
        raise RevifyError(
            f"{data.name} has {len(data.train)} images to train on, fewer than a batch of "
            f"{recipe.batch_size} for each of {accelerator.num_processes} processes: lower the batch size."
        )
    updates = math.ceil(len(train) / recipe.grad_accum)
    schedule, _ = create_scheduler_v2(
        optimizer,
        recipe.sched,
        num_epochs=recipe.epochs,
        warmup_epochs=min(recipe.warmup_epochs, recipe.epochs - 1),
        warmup_lr=recipe.lr / 100,
        min_lr=min(recipe.min_lr, recipe.lr),
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return _Run(recipe, accelerator, model, prepared, schedule, train, validation, mixup, updates, peak)


def _step_memory(model: nn.Module, data: ImageData, batch_size: int, accelerator: Accelerator) -> int:
    """Peak bytes of the second step of a copy: the first step allocates the gradients."""
    twin = copy.deepcopy(model)
    images, targets = sample_batch(data, batch_size, accelerator.device)

    def forward() -> Tensor:
        with accelerator.autocast():
            return cross_entropy(twin(images).float(), targets)

    torch.autograd.backward(forward())
    return count_memory(forward, accelerator.device).peak


def sample_batch(data: ImageData, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first validation images and their classes, after `make_loaders`; the same batch every time."""
    samples = [data.validation[place % len(data.validation)] for place in range(size)]
    images = torch.stack([image for image, _ in samples])
    return images.to(device), torch.tensor([target for _, target in samples], device=device)


def _train_epoch(run: _Run, epoch: int, progress: Progress) -> _Pass:
    """One pass over the training images."""
    run.model.train()
    run.train.set_epoch(epoch)
    seconds: list[float] = []
    totals = torch.zeros(3, device=run.accelerator.device)  # loss, hits, images
    done, lr = epoch * run.updates, 0.0
    for images, targets in _batches(run.train):
        start = time.perf_counter()
        with run.accelerator.accumulate(run.model):
            loss, output = _loss(run, images, targets)
            run.accelerator.backward(loss)
            if run.accelerator.sync_gradients:
                if run.recipe.clip_grad is not None:
                    run.accelerator.clip_grad_norm_(run.model.parameters(), run.recipe.clip_grad)
                lr = max(group["lr"] for group in run.optimizer.param_groups)
                done += 1
            run.optimizer.step()
            run.optimizer.zero_grad()
        if run.accelerator.sync_gradients and run.schedule:
            run.schedule.step_update(done)
        wait(run.accelerator.device)
        seconds.append(time.perf_counter() - start)
        _check_loss(loss.item(), epoch, len(seconds), run.recipe)
        hits = (output.argmax(1) == targets).sum()
        totals += torch.stack([loss.detach() * len(images), hits, totals.new_tensor(len(images))])
        progress.step(epoch, loss.item())
    loss_sum, hit_sum, count = run.accelerator.reduce(totals, "sum").tolist()
    return _Pass(lr, loss_sum / count, hit_sum / count, statistics.median(seconds))


def _loss(run: _Run, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one batch, and the model's output."""
    if run.mixup is None:
        output = run.model(images).float()
        return cross_entropy(output, targets, label_smoothing=run.recipe.smoothing), output
    mixed, shares = run.mixup(images, targets)
    output = run.model(mixed).float()
    return cross_entropy(output, shares), output


def _check_loss(value: float, epoch: int, step: int, recipe: Recipe) -> None:
    if not math.isfinite(value):
        raise RevifyError(
            f"the loss is {value} in epoch {epoch + 1}, step {step}: lower the learning rate ({recipe.lr}), "
            "clip the gradient, or use bf16 instead of fp16. The state of the last whole epoch is kept."
        )


def _batches(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; an error of a worker process without the traceback that torch adds to it."""
    try:
        yield from loader
    except RevifyError as error:
        raise RevifyError(str(error).rpartition("RevifyError: ")[2].strip()) from error


def _write(form: Form, history: list[Epoch], accelerator: Accelerator) -> None:
    """Weights, metrics and state of a finished epoch, all of them or none."""

    def show(to: Path, before: Path) -> None:
        if form.save:
            form.save(form.model, to / "last.safetensors")
            if history[-1] is best_epoch(history):
                form.save(form.model, to / "best.safetensors")
            else:
                for kept in before.glob("best.*safetensors"):
                    place(kept, to / kept.name)
        write_metrics(to, form.name, history)

    with telling_disk_errors(form.folder):
        save_state(form.folder, history, accelerator, show)
