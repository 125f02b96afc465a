"""A recipe → Accelerate's device, precision and processes for the time of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration

from revify.errors import RevifyError
from revify.finetuning.recipe import Recipe


@contextmanager
def accelerating(recipe: Recipe) -> Iterator[Accelerator]:
    """An Accelerator for this run, whose global state goes with it if it came with it."""
    first = not PartialState._shared_state
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else processes of torchrun would not see each other
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.grad_accum,
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
        )
    except ValueError as error:
        raise RevifyError(
            f"Accelerate cannot run with mixed precision {recipe.mixed_precision!r} here: {error} "
            "Use bf16, or no mixed precision."
        ) from error
    try:
        if recipe.mixed_precision != "no" and not accelerator.native_amp:  # it would use float32
            raise RevifyError(
                f"mixed precision {recipe.mixed_precision} does not work on this device "
                f"({accelerator.device}): use bf16, or none."
            )
        yield accelerator
    finally:
        accelerator.end_training()
        if first:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
