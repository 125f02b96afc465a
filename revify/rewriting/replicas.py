"""The copies that nn.DataParallel makes of a converted model: each stand-in must run the copy that it sits in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from revify.runtime.standing_in import StandIn
from revify.runtime.tape import is_plain, plain_backward


class Replicator:
    """Stands in for the way in which nn.DataParallel copies a module, whose copy gets a stand-in of its own.

    Args:
        stand_in: of the module.
    """

    def __init__(self, stand_in: StandIn) -> None:
        self.stand_in = stand_in

    def __call__(self) -> nn.Module:
        module = self.stand_in.module
        replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]
        forward = self.stand_in.on(replica)
        replica.forward = _Plain(forward) if is_plain() else forward
        return replica


class _Plain:
    """A replica's forward where the model was called in a plain backward, which its own thread would not know."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with plain_backward():
            return self._forward(*args, **kwargs)
