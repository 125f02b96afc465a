"""Checkpointing of what lies between the stages: the module's input is kept, and it runs again in backward.

It is the runtime's rerun without a stream, so it has the runtime's manners: BatchNorm counts once, the random numbers
repeat, autograd's graph is real.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from revify.compiling import hidden_from_compiler
from revify.errors import StreamError
from revify.replay import SideInputs
from revify.reruns import Rerun
from revify.runtime import saves_nothing


class Checkpointed:
    """Stands in for the forward of a module between the stages.

    Args:
        module: the module, as it was.
        name: its path, for errors.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    @hidden_from_compiler
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: the module's own signature
        if not saves_nothing():
            return self._run(*args, **kwargs)
        side = SideInputs.of(args, kwargs)
        device = next((t.device for t in side.tensors()), None)
        if device is None:
            raise StreamError(f"{self.name} was called without a tensor, so there is nothing to checkpoint it from.")
        rerun = Rerun(self.name, self._run, self.module, side)
        return rerun.first(lambda: self._run(*args, **kwargs), device, partial(_again, rerun))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def _again(rerun: Rerun) -> None:
    with torch.no_grad():
        rerun.again(catch=True)
