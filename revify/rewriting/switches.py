"""Switches of other libraries on a converted model: gradient checkpointing, and the caches of transformers.

set_grad_checkpointing(), enable_gradient_checkpointing()     are refused: the blocks are recomputed already
gradient_checkpointing_enable(…)                              warns and does nothing, as trainers call it for a flag
use_cache=True, while training                                no cache, as with transformers' own checkpointing
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from revify.errors import RefusalError
from revify.runtime.tape import is_plain

TIMM, TRANSFORMERS, DIFFUSERS = (
    "set_grad_checkpointing",
    "gradient_checkpointing_enable",
    "enable_gradient_checkpointing",
)
METHODS = (TIMM, TRANSFORMERS, DIFFUSERS)


class Switch:
    """Stands in for a method that switches gradient checkpointing on.

    Args:
        method: its name.
        kind: the class of the module that it is of.
    """

    def __init__(self, method: str, kind: str) -> None:
        self.method, self.kind = method, kind

    def __call__(self, *args: Any, **kwargs: Any) -> None:  # Any: each library has its own arguments
        if self.method == TIMM and not (args[0] if args else kwargs.get("enable", True)):
            return
        sentence = (
            f"{self.kind}.{self.method}(): this model is converted, so its blocks are recomputed already, and gradient "
            "checkpointing would recompute them once more."
        )
        if self.method != TRANSFORMERS:
            raise RefusalError(f"{sentence} Leave this call out, or call revify.disable(model) first.")
        warnings.warn(
            f"{sentence} It stays off (gradient_checkpointing=False says the same).", UserWarning, stacklevel=2
        )


class NoCache:
    """A hook before the forward of a transformers model: while it trains, it keeps no cache.

    Args:
        place: at which position, among the arguments, the forward takes `use_cache`.
    """

    def __init__(self, place: int) -> None:
        self.place, self.told = place, False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training or not torch.is_grad_enabled() or self.place < len(args):
            return None
        given, asked = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if given is not None and (not hasattr(given, "get_seq_length") or given.get_seq_length()):
            if is_plain():
                return None
            raise RefusalError(
                f"{type(module).__name__} was given past_key_values while training, to which a block that runs again in "
                "backward would append once more. Train without it, under revify.plain_backward(), or call "
                "revify.disable(model) first. (Prefix tuning does not go together with recomputation.)"
            )
        if given is None and not (getattr(module.config, "use_cache", False) if asked is None else asked):
            return None
        if not self.told:
            self.told = True
            warnings.warn(
                f"{type(module).__name__}: use_cache=True while training would hold what the blocks are recomputed for, so "
                "there is no cache (as with gradient checkpointing). In eval mode and without gradients there is.",
                UserWarning,
                stacklevel=2,
            )
        return args, {**kwargs, "use_cache": False} | ({} if given is None else {"past_key_values": None})


def place_of_cache(module: nn.Module) -> int | None:
    """Where the forward of a transformers model takes `use_cache`, counted after `self`; None where it keeps no cache."""
    own = hasattr(type(module), TRANSFORMERS) and hasattr(getattr(module, "config", None), "use_cache")
    names = list(inspect.signature(type(module).forward).parameters)[1:] if own else []
    return names.index("use_cache") if "use_cache" in names else None


def set_switches(model: nn.Module) -> None:
    """Let a converted model answer them, in place."""
    for module in model.modules():
        for method in METHODS:
            if callable(getattr(type(module), method, None)):
                module.__dict__[method] = Switch(method, type(module).__name__)
        place = place_of_cache(module)
        if place is not None:
            module.register_forward_pre_hook(NoCache(place), prepend=True, with_kwargs=True)


def unset_switches(model: nn.Module) -> None:
    """Let the libraries answer them again, in place."""
    for module in model.modules():
        for method in [name for name, value in vars(module).items() if isinstance(value, Switch)]:
            del module.__dict__[method]
        for number in list(_numbers(module)):
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def _numbers(module: nn.Module) -> Iterator[int]:
    return (number for number, hook in module._forward_pre_hooks.items() if isinstance(hook, NoCache))
