"""A forward function → the bytes that its forward and backward allocate.

CUDA counts by itself. On the CPU the profiler notes every allocation and release; their running sum is
exact, and the same in every run.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from revify.errors import RevifyError

_FORWARD_DONE = "revify: forward done"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes above what was allocated before the step: at its highest, and between forward and backward."""

    peak: int
    held: int


@dataclass(frozen=True, slots=True)
class Moment:
    """The state of a CPU's allocator just after it gave out or took back memory.

    Args:
        nanoseconds: when, on the profiler's clock.
        allocated: bytes above what was allocated before the step.
        backward: whether the forward pass is over.
    """

    nanoseconds: int
    allocated: int
    backward: bool


def count_memory(forward: Callable[[], Tensor], device: torch.device) -> Memory:
    """Run `forward` and the backward of the loss it returns; count what the device's allocator gives out."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection that happens to fall into the step would free what the step did not allocate
    try:
        return _count_cuda(forward, device) if device.type == "cuda" else _count_cpu(forward)
    finally:
        if collecting:
            gc.enable()


def _count_cuda(forward: Callable[[], Tensor], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = forward()
    held = torch.cuda.memory_allocated(device) - before
    torch.autograd.backward(result)
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device) - before, held)


def _count_cpu(forward: Callable[[], Tensor]) -> Memory:
    moments = follow_memory(forward)
    held = [moment.allocated for moment in moments if not moment.backward]
    return Memory(max((moment.allocated for moment in moments), default=0), held[-1] if held else 0)


def follow_memory(forward: Callable[[], Tensor]) -> list[Moment]:
    """Run `forward` and the backward of the loss it returns on the CPU; what is allocated all the way.

    Raises:
        RevifyError: the profiler saw nothing.
    """
    with (
        _quiet_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record,
    ):
        result = forward()
        with record_function(_FORWARD_DONE):
            pass
        torch.autograd.backward(result)
    kineto = record.profiler and record.profiler.kineto_results
    if kineto is None:
        raise RevifyError("measure: the profiler returned no events, so memory on the CPU cannot be counted.")
    events = [event for event in kineto.events() if event.name() in ("[memory]", _FORWARD_DONE)]
    allocated, backward = 0, False
    moments = []
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == _FORWARD_DONE:
            backward = True
        else:
            allocated += event.nbytes()
            moments.append(Moment(event.start_ns(), allocated, backward))
    return moments


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep libkineto, which reads its log level when it starts, from writing to the user's terminal."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "6")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def wait(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
