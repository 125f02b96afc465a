"""A callback for the Trainer of transformers: the model is converted in place while it trains."""

from __future__ import annotations

import warnings
from typing import Any, Unpack

from torch import nn
from transformers import TrainerCallback

from revify.conversion import disable, enable
from revify.methods import Method, Options
from revify.planning.inputs import Example


class RevifyCallback(TrainerCallback):
    """Converts the trainer's model in place, before it is wrapped, and makes it plain again when the training ends.

    Example:
        >>> from revify.integrations.transformers import RevifyCallback
        >>> callback = RevifyCallback(batch)  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()  # doctest: +SKIP

    Args:
        example: one batch, as for `revify.plan`.
        method: as for `revify.enable`.
        options: as for `revify.enable`.
    """

    def __init__(self, example: Example = None, *, method: Method | None = None, **options: Unpack[Options]) -> None:
        self.example, self.method, self.options = example, method, options

    def on_init_end(self, *given: Any, model: nn.Module, **kwargs: Any) -> None:  # Any: the trainer's records
        """The trainer has its model, and has not wrapped it yet."""
        self._enable(model)

    def on_train_begin(self, *given: Any, model: nn.Module, **kwargs: Any) -> None:
        """A second training of the same trainer."""
        if not hasattr(model, "revify_plan"):
            self._enable(model)

    def on_train_end(self, *given: Any, model: nn.Module, **kwargs: Any) -> None:
        """What is saved and evaluated afterwards is the plain model."""
        disable(model)

    def _enable(self, model: nn.Module) -> None:
        if getattr(model, "is_gradient_checkpointing", False):
            warnings.warn(
                f"{type(model).__name__}: gradient checkpointing is switched off, since revify recomputes the blocks itself. "
                "TrainingArguments(gradient_checkpointing=False) says the same.",
                stacklevel=2,
            )
            model.gradient_checkpointing_disable()  # type: ignore[operator]  # a method of transformers' models
        enable(model, self.example, method=self.method, **self.options)
