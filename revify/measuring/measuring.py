"""A model and a batch → what one training step costs, plain, checkpointed and converted, as a table.

All three run in one process on the same batch, with the same parameters, and their gradients are allocated
before the measured step, so that neither counts. Memory is what the allocator says (CUDA: its own counters;
CPU: the profiler's allocation events, summed), above what was there when the step began:

    peak   the most that was allocated at any moment of the step
    held   what is still allocated between forward and backward: everything that is kept for the backward, in
           whatever form (saved tensors; stream values, packed bits), and the loss
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from revify._version import __version__
from revify.conversion import convert, revert
from revify.conversion import plan as make_plan
from revify.errors import RevifyError
from revify.measuring.memory import Memory, count_memory, wait
from revify.measuring.report import Report, Row, describe
from revify.plans import Plan
from revify.rewriting.applying import share
from revify.stage_plans import StagePlan

Batch = Tensor | tuple[Tensor, ...]
Loss = Callable[[Any], Tensor]  # Any: whatever the model returns


def measure(
    model: nn.Module,
    batch: Batch,
    *,
    plan: Plan | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    repeats: int = 5,
) -> Report:
    """Measure one training step of a model plain, checkpointed and converted: peak and held memory, and time.

    The rival is per-block checkpointing: timm's `set_grad_checkpointing` where the model has it, else
    `torch.utils.checkpoint` around each block of the plan. A model in evaluation mode is measured in
    training mode; one in training mode as it is, frozen parts included. Afterwards the model is as it was:
    mode, gradients, buffers and random numbers. Peak and held bytes repeat exactly on the CPU; times do not.

    Example:
        >>> import timm, torch, revify
        >>> model = timm.create_model("test_vit")
        >>> report = revify.measure(model, torch.randn(4, 3, 160, 160), repeats=1)
        >>> report.converted.held_bytes < report.plain.held_bytes
        True

    Args:
        model: a plain model, or a converted one, which is reverted for the other two rows.
            One with streams="split" has no plain model: give that model and the plan, not what was converted.
        batch: the input, or a tuple of the inputs in order; on the model's device (CPU or CUDA).
        plan: how to convert a plain model; None is `revify.plan(model, batch)`.
        loss: model output → scalar; None is the mean square of the output.
        autocast: run the forward pass under autocast to this dtype; None runs it without autocast.
        repeats: timed runs of each form, ≥ 1.

    Returns:
        The report: `report.plain`, `report.checkpointed`, `report.converted`, and what they were measured on.

    Raises:
        RevifyError: the batch, the plan or `repeats` cannot be measured.
        RefusalError: the model is not convertible.
    """

    inputs = _checked(model, batch, plan, repeats)
    device = inputs[0].device
    with _unchanged(model, device):
        forms, how = _forms(model, inputs, plan)
        steps = [_Step(form, inputs, loss or mean_square, autocast) for form in forms]
        memories = [_warm_memory(step) for step in steps]
        seconds = _alternate(steps, memories, repeats)
    ratios = [_paired_ratio(times, seconds[1]) for times in seconds]
    rows = [
        Row(
            text,
            memory.peak if memory else None,
            memory.held if memory else None,
            statistics.median(times) if times else None,
            ratio,
        )
        for text, memory, times, ratio in zip(how, memories, seconds, ratios, strict=True)
    ]
    return Report(
        type(model).__name__,
        tuple(tuple(value.shape) for value in inputs),
        f"autocast {autocast}".replace("torch.", "") if autocast else str(inputs[0].dtype).replace("torch.", ""),
        describe(device),
        torch.get_num_threads(),
        repeats,
        torch.__version__,
        version("timm"),
        __version__,
        *rows,
    )


def mean_square(output: Any) -> Tensor:  # Any: whatever the model returns
    """The mean square of every floating-point tensor in a model's output, summed."""
    values = [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.stack([value.float().square().mean() for value in values]).sum()


@dataclass(frozen=True, slots=True)
class _Step:
    """One training step: forward, loss, backward into gradients that exist."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Loss
    autocast: torch.dtype | None

    def forward(self) -> Tensor:
        kind = self.inputs[0].device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            result = self.loss(self.model(*self.inputs))
        if not isinstance(result, Tensor) or result.numel() != 1 or not result.requires_grad:
            found = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise RevifyError(f"measure: the loss must be one number that has a gradient; it is {found}.")
        return result

    def seconds(self) -> float:
        device = self.inputs[0].device
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        wait(device)
        start = time.perf_counter()
        torch.autograd.backward(self.forward())
        wait(device)
        return time.perf_counter() - start


def _warm_memory(step: _Step) -> Memory | None:
    """The memory of a second step (the first allocates gradients and caches); None if it does not fit."""
    try:
        step.seconds()
        return count_memory(step.forward, step.inputs[0].device)
    except torch.OutOfMemoryError:
        return None


def _alternate(steps: list[_Step], memories: list[Memory | None], repeats: int) -> list[list[float]]:
    """Seconds per step and round; the order rotates, so that none always follows the same other."""
    seconds: list[list[float]] = [[] for _ in steps]
    for round_ in range(repeats):
        for place in range(len(steps)):
            which = (round_ + place) % len(steps)
            if memories[which] is not None:
                seconds[which].append(steps[which].seconds())
    return seconds


def _paired_ratio(times: list[float], rival: list[float]) -> float | None:
    return statistics.median(a / b for a, b in zip(times, rival, strict=True)) if times and rival else None


def _forms(model: nn.Module, inputs: tuple[Tensor, ...], plan: Plan | None) -> tuple[list[nn.Module], list[str]]:
    """The model plain, checkpointed and converted, all sharing its parameters, and how each was made."""
    if "revify_plan" in vars(model):
        converted, plain = share(model), revert(model)
    else:
        plain = share(model)
        converted = convert(plain, plan=plan or make_plan(plain, inputs))
    used: Plan = converted.revify_plan  # type: ignore[assignment]  # nn.Module promises a Tensor or a Module
    rival = share(plain)
    method = checkpoint_blocks(rival, used)
    forms = [plain, rival, converted]
    if not model.training:
        for form in forms:
            form.train()
    blocks = sum(len(stage.blocks) for stage in used.stages)
    couplings = sorted({_coupling(stage) for stage in used.stages})
    made = f"{blocks} blocks, {len(used.stages)} stages ({'; '.join(couplings)}), transitions {used.transitions}"
    return forms, ["ordinary autograd", method, made]


def _coupling(stage: StagePlan) -> str:
    """How the steps of a stage are undone, in words."""
    return stage.coupling or f"{'coded' if stage.step == 'coded' else stage.predictor}, {stage.bits_text} bits"


def checkpoint_blocks(model: nn.Module, plan: Plan) -> str:
    """Switch per-block checkpointing on in a plain model, timm's where it has it; say which."""
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is not None:
        try:
            switch(True)
            return "timm's set_grad_checkpointing"
        except AssertionError:  # how timm says that a model does not support it
            switch(False)
    for stage in plan.stages:
        for path in stage.paths:
            module = model.get_submodule(path)
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return "torch.utils.checkpoint around each block of the plan"


def _checked(model: nn.Module, batch: Any, plan: Plan | None, repeats: int) -> tuple[Tensor, ...]:  # Any: user input
    inputs = batch if isinstance(batch, tuple) else (batch,)
    where = f"measure({type(model).__name__})"
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise RevifyError(f"{where}: batch must be a tensor or a tuple of tensors, not {type(batch).__name__}.")
    if any(value.numel() == 0 for value in inputs):
        shapes = [tuple(value.shape) for value in inputs]
        raise RevifyError(f"{where}: the batch of shape {shapes} is empty; give at least one example.")
    if repeats < 1:
        raise RevifyError(f"{where}: repeats is {repeats}; at least one timed run is needed.")
    if plan is not None and "revify_plan" in vars(model):
        raise RevifyError(f"{where}: the model is converted already, by its own plan; give plan= with a plain model.")
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise RevifyError(f"{where}: no parameter requires a gradient, so there is no training step to measure.")
    devices = {value.device for value in [*inputs, *parameters]}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        found = ", ".join(sorted(map(str, devices)))
        raise RevifyError(f"{where}: model and batch must be on one device, the CPU or one CUDA device; found {found}.")
    return tuple(value.detach() for value in inputs)


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the body train forms that share the model's parameters and buffers; then put everything back."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
