"""What torch has and does not name in public: all of it is here, to be found when torch changes."""

from __future__ import annotations

import torch
from torch._compile import _disable_dynamo

# torch's own lazy form of torch.compiler.disable, which torch.optim uses, too: importing the compiler takes seconds
hidden_from_compiler = _disable_dynamo


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some, as the meta device, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def is_exporting() -> bool:
    """Whether torch reads the model into a graph: by torch.export, torch.jit.trace or a way to ONNX through these."""
    return (
        torch.compiler._is_exporting_flag or torch._C._is_tracing()
    )  # torch 2.8's is_exporting() is true in compile, too


def refused_export() -> str:
    """The way of reading a model that is under way and cannot follow what rides on a tensor; empty for all others."""
    if torch.compiler._is_exporting_flag:
        return "torch.export(strict=True)" if torch.compiler.is_dynamo_compiling() else ""
    return "torch.onnx.export(dynamo=False)" if torch.onnx.is_in_onnx_export() else ""


def is_transforming() -> bool:
    """Whether a transform of torch.func runs (vmap, grad, jvp, …)."""
    return torch._C._functorch.peek_interpreter_stack() is not None
