"""What torch has and does not name in public: all of it is here, to be found when torch changes."""

from __future__ import annotations

import torch
from torch._compile import _disable_dynamo

# torch's own lazy form of torch.compiler.disable, which torch.optim uses, too: importing the compiler takes seconds
hidden_from_compiler = _disable_dynamo


def is_exporting() -> bool:
    """Whether torch reads the model into a graph: by torch.export, torch.jit.trace or a way to ONNX through these."""
    return torch.compiler.is_exporting() or torch._C._is_tracing()


def is_transforming() -> bool:
    """Whether a transform of torch.func runs (vmap, grad, jvp, …)."""
    return torch._C._functorch.peek_interpreter_stack() is not None
