"""A callback for Lightning's Trainer: a network of the module is converted in place while it is fitted."""

from __future__ import annotations

from typing import Any, Unpack

from lightning.pytorch import Callback
from torch import nn

from revify.conversion import disable, enable
from revify.methods import Method, Options
from revify.planning.inputs import Example


class RevifyCallback(Callback):
    """Converts a network in place before the optimizers and strategies see it, and makes it plain again at the end.

    Example:
        >>> from revify.integrations.lightning import RevifyCallback
        >>> callback = RevifyCallback("network", images)  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP

    Args:
        path: of the network in the LightningModule, "" for the module itself.
        example: one batch, as for `revify.plan`.
        method: as for `revify.enable`.
        options: as for `revify.enable`.
    """

    def __init__(
        self, path: str, example: Example = None, *, method: Method | None = None, **options: Unpack[Options]
    ) -> None:
        self.path, self.example, self.method, self.options = path, example, method, options

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:  # Any: Lightning's Trainer
        """The module is there, and is not wrapped yet."""
        if stage == "fit":
            enable(pl_module.get_submodule(self.path), self.example, method=self.method, **self.options)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """What is saved and evaluated afterwards is the plain network."""
        if stage == "fit":
            disable(pl_module.get_submodule(self.path))
