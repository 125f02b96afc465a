"""What `plan` and `convert` are given, checked: the state of the model, its example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revify.errors import RefusalError, RevifyError
from revify.plans import Plan
from revify.reading.copying import is_compiled
from revify.reading.tracing import Inputs
from revify.rewriting.switches import place_of_cache

Example = Tensor | Sequence[Tensor] | Mapping[str, Any] | None  # Any: keyword inputs may be of every type
CHECKPOINTING = {  # how each library switches it off
    "set_grad_checkpointing": "model.set_grad_checkpointing(False)",
    "gradient_checkpointing_disable": "model.gradient_checkpointing_disable()",
    "disable_gradient_checkpointing": "model.disable_gradient_checkpointing()",
}


def check_model(model: nn.Module) -> None:
    """Refuse models in a state in which they cannot be converted rightly."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise RefusalError(f"expected a torch.nn.Module, got {name}. Pass the model itself.")
    for path, module in model.named_modules():
        if isinstance(getattr(module, "revify_plan", None), Plan):
            what = f"holds a module that is already converted ({path})" if path else "is already converted"
            raise RefusalError(f"{name} {what}. Use it as it is, or revify.revert it first.")
    scripted = [path for path, module in model.named_modules() if path and isinstance(module, torch.jit.ScriptModule)]
    if scripted and not isinstance(model, torch.jit.ScriptModule):
        raise RefusalError(
            f"{name} holds a TorchScript module ({scripted[0]}), which has no Python forward that could be watched. Convert "
            "the model with the module as it was before torch.jit.script or torch.jit.trace."
        )
    lazy = [path for path, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise RefusalError(
            f"{name}: the parameter {lazy[0]} has no shape yet (a Lazy module). Run the model once on a batch, then convert it."
        )
    wrapper = _wrapper(model)
    if wrapper:
        raise RefusalError(
            f"{name} is {wrapper}. Convert the plain model first, then wrap it: the wrapper must see the converted blocks."
        )
    for path, module in model.named_modules():
        if any(getattr(module, flag, False) is True for flag in ("grad_checkpointing", "gradient_checkpointing")):
            known = (way for method, way in CHECKPOINTING.items() if callable(getattr(model, method, None)))
            raise RefusalError(
                f"{name}: gradient checkpointing is switched on (in {path or 'the model'}), and revify recomputes the blocks "
                f"itself: one of the two is enough. Switch it off first: {next(known, 'set that flag to False')}."
            )


def _wrapper(model: nn.Module) -> str | None:
    """How a model is wrapped, by the classes of torch that do it; importing them all would take seconds."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    kinds = {kind.__name__ for kind in classes if kind.__module__.startswith("torch.")}
    if kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"}:
        return "wrapped for parallel training (DDP, FSDP or DataParallel)"
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    if compiled or any(type(m).__name__ == "OptimizedModule" for m in model.modules()):
        return "compiled with torch.compile, or holds a compiled module"
    forwards = [path or "the model" for path, m in model.named_modules() if is_compiled(vars(m).get("forward"))]
    if forwards:
        return f"compiled with torch.compile in place (the forward of {', '.join(forwards[:3])})"
    if isinstance(model, torch.jit.ScriptModule):
        return "a TorchScript module"
    return None


def example_inputs(model: nn.Module, example: Example) -> tuple[Tensor, ...] | Inputs:
    """The inputs to analyse a model with: those given, or two images of the size in its timm configuration."""
    if isinstance(example, Tensor):
        return (example,)
    if example is not None:
        if isinstance(example, Mapping) and any(isinstance(x, Tensor) for x in example.values()):
            return _keywords(model, example)
        inputs = () if isinstance(example, Mapping) else tuple(example)
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            raise RevifyError(
                "example: expected a tensor, a tuple of tensors (the positional inputs of the model) or a dictionary with "
                "tensors in it (its keyword inputs)."
            )
        return inputs
    size = _input_size(model)
    if size is None:
        raise RefusalError(
            f"{type(model).__name__} has no timm configuration that names its input size, so it cannot be analysed without "
            "an example. Pass one batch: revify.convert(model, images)."
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return (torch.zeros(2, *size, dtype=dtype, device="meta"),)


def _keywords(model: nn.Module, example: Mapping[str, Any]) -> Inputs:
    """Inputs by keyword; without a cache where the model has one and nothing is said, as it trains once it is converted."""
    constants = {name: value for name, value in example.items() if not isinstance(value, Tensor)}
    if place_of_cache(model) is not None:
        constants = {"use_cache": False, **constants}
    return Inputs({name: value for name, value in example.items() if isinstance(value, Tensor)}, constants)


def _input_size(model: nn.Module) -> tuple[int, ...] | None:
    """Channels, height and width: of the model as built (`img_size=`), else of its timm configuration."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None:
        return None
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    channels = getattr(model, "in_chans", size[0])
    return (channels, *built) if built else tuple(size)
