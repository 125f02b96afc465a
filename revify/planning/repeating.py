"""What is to be checkpointed, run twice on a copy: what does not repeat itself is left out, with its reason in the plan.

A second run has the conditions of the first, and what torch's generators draw (`runtime.conditions`). It does not repeat what
Python or numpy draw, or a state that is hidden from it: known here, such a module is kept under ordinary autograd; found
only in training, it is an error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revify.errors import RevifyError
from revify.planning.transitions import find_checkpoints
from revify.plans import Plan, Refusal
from revify.reading.draws import drawing
from revify.reading.flows import device_of, holds_data, with_data
from revify.reading.observing import Observation
from revify.reading.tracing import Example, call_with, copy_with_data, tensors_of
from revify.runtime.fingerprints import checksum, comparable
from revify.runtime.replay import SideInputs
from revify.runtime.reruns import Rerun

REMEDY = (
    "it is not checkpointed, and trains under ordinary autograd; to have it checkpointed, draw from torch's generators and "
    "keep what goes from run to run in buffers or plain attributes"
)


def add_checkpoints(
    plan: Plan, model: nn.Module, example: Example, observation: Observation, skipped: Collection[str]
) -> Plan:
    """The plan with what is to be checkpointed outside of its stages, and what cannot be among its refusals.

    Args:
        plan: with stages.
        model: which the plan is of; it stays as it is.
        example: its inputs.
        observation: of the model.
        skipped: the paths of modules that not every forward pass calls.
    """
    reasons: dict[str, str] = {}
    tried: set[str] = set()
    while True:
        found = find_checkpoints(observation, plan, parted=reasons)
        found = tuple(c for c in found if not set(skipped).intersection(c.paths))
        new = {path for checkpoint in found for path in checkpoint.paths} - tried
        if not new or not holds_data(model):
            break
        different = run_twice(model, example, new)
        tried |= new
        reasons |= different
        if not different:
            break
    left_out = (Refusal(path, reason, REMEDY) for path, reason in reasons.items())
    return replace(plan, checkpointed=found, refusals=(*plan.refusals, *left_out))


def run_twice(model: nn.Module, example: Example, paths: Collection[str]) -> dict[str, str]:
    """Run a copy of the model, and modules of it twice; the reasons of those that differed, by path."""
    copied, found = copy_with_data(model), dict[str, str]()
    given = with_data(example, device_of(model))
    outer = tuple(tensors_of(given))
    for path in paths:
        module = copied.get_submodule(path)
        module.forward = partial(_twice, module, module.forward, path, found, outer)
    with drawing(None), torch.no_grad():
        call_with(copied, given)
    return found


def _twice(
    module: nn.Module,
    forward: Any,
    path: str,
    found: dict[str, str],
    outer: tuple[Tensor, ...],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:  # Any: the module's own signature
    """Run the module's forward twice; its first outputs, without a graph."""
    side = SideInputs.of(*_with_gradients(args, kwargs, outer))
    run = partial(_on_copies, forward)
    rerun = Rerun(path, run, module, side)
    device = next((tensor.device for tensor in side.tensors()), torch.device("cpu"))
    with torch.enable_grad():
        once, more = side.again()
        outputs = rerun.first(lambda: run(*once, **more), device, _never)
    before = _checksums(outputs)
    try:
        after = _checksums(rerun.again(catch=True))
    except RevifyError:
        found[path] = "saves other tensors for its backward when it is run again"
    else:
        if [bool(a != b) for a, b in zip(before, after, strict=True)].count(True):
            found[path] = "returns other values when it is run again under the same conditions"
        elif any(map(bool, rerun.differs)):
            found[path] = "has other values saved for its backward when it is run again under the same conditions"
    return pytree.tree_map_only(Tensor, Tensor.detach, outputs)


def _with_gradients(
    args: tuple[Any, ...], kwargs: dict[str, Any], outer: tuple[Tensor, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as they are in training: what is no number of another kind, and no input of the model, has a gradient."""
    plain = set(map(id, outer))

    def with_gradient(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.is_floating_point() and id(tensor) not in plain)

    given: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, with_gradient, (args, kwargs))
    return given


def _on_copies(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a forward that may change its inputs in place."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    return forward(*args, **kwargs)


def _checksums(outputs: Any) -> list[Tensor]:
    return [checksum(leaf) for leaf in pytree.tree_leaves(outputs) if comparable(leaf)]


def _never() -> None:
    raise AssertionError("no backward is run here")
