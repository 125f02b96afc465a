"""Hiding a function from torch.compile, without the seconds that importing the compiler takes before it is needed."""

from __future__ import annotations

from torch._compile import _disable_dynamo

hidden_from_compiler = _disable_dynamo  # torch's own lazy form of torch.compiler.disable, which torch.optim uses, too
