"""Modules whose own forward adds → runs of steps within them, proven by a run of a copy.

Where no module adds to its input, because the loop that calls the branches does (`x = attn(x) + x; x = ff(x) + x`), the
container itself, or the whole model, is cut into a prefix, steps and a suffix (`reading.programs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revify.planning.refusals import parents
from revify.planning.stages import Along, Stage
from revify.reading.additions import count_additions
from revify.reading.chains import FEWEST
from revify.reading.observing import Call, Observation
from revify.reading.programs import Part, Program, read_program
from revify.reading.tracing import Example, Trace, call_with, constants_of, copy_with_data, each_of, meta_copy

BLOCK_ADDITIONS = 4  # in a module that is a block of a run already: fewer are its attention and its MLP


@dataclass(frozen=True, slots=True)
class ContainerRun(Along):
    """A run of steps in the forward of one module.

    Args:
        path: of the module, "" for the model itself.
        kind: its class name.
        run: which of its runs.
        given: which of its arguments are tensors.
        shape: of the stream.
        dtype: of the stream.
        saved: what autograd saves in each step.
        paths: of the modules that the steps call.
        spans: from where to where the modules of each step run, in calls that had started.
    """

    path: str
    kind: str
    run: int
    given: tuple[int | str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    saved: tuple[int, ...]
    paths: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def saved_bytes(self) -> int:
        """What autograd saves in all of its steps."""
        return sum(self.saved)

    @property
    def benefit(self) -> int:
        """Bytes that the reversible stage does not hold."""
        return self.saved_bytes - max(self.saved) - 2 * self.stream_bytes


def find_containers(
    model: nn.Module, example: Example, observation: Observation, graph: Trace, runs: Collection[Stage]
) -> tuple[ContainerRun, ...]:
    """The runs in the forwards of the model's modules, in the order of their calls.

    Args:
        model: the plain model; it stays as it is.
        example: its inputs.
        observation: of the model on them.
        graph: of the model.
        runs: of residual blocks, which are known already.
    """
    blocks = {block.call.path for run in runs for block in run.blocks}
    counts = Counter(call.path for call in observation.calls)
    calls = {call.path: call for call in observation.calls}
    given: dict[str, tuple[int | str, ...]] = {}
    if not constants_of(example):  # else the model's own forward depends on them
        given[""] = tuple(example if isinstance(example, Mapping) else range(len(example)))
    given |= {path: tuple(i.argument for i in call.inputs) for path, call in calls.items()}
    programs: dict[str, Program] = {}
    for path, count in (count_additions(graph) + _repeated(counts)).items():
        if count >= (BLOCK_ADDITIONS if path in blocks else FEWEST) and counts[path] <= 1 and path in given:
            program = read_program(model.get_submodule(path), given[path])
            if program is not None:
                programs[path] = program
    if not programs:
        return ()
    measured = _measure(model, example, programs)
    found: list[ContainerRun] = []
    for path, program in programs.items():
        spans = _spans(program, path, calls.get(path), observation)
        for run in range(program.runs):
            places = [place for place, part in enumerate(program.parts) if part.run == run]
            steps = [measured[path].get(place) for place in places]
            own = tuple(spans[place] for place in places if place in spans)
            alike = {(step.shape, step.dtype) for step in steps if step is not None}
            if None in steps or len(alike) != 1 or not own:
                continue
            ((shape, dtype),) = alike
            inner = dict.fromkeys(_join(path, name) for place in places for name in program.parts[place].modules)
            saved = tuple(step.saved for step in steps if step is not None)
            kind = type(model.get_submodule(path)).__name__
            found.append(ContainerRun(path, kind, run, given[path], shape, dtype, saved, tuple(inner), own))
    return tuple(sorted(found, key=lambda run: run.start))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _repeated(counts: Counter[str]) -> Counter[str]:
    """How many calls each module makes of children that it calls more than once."""
    found = Counter[str]()
    for path, count in counts.items():
        caller = next(parent for parent in (*reversed(parents(path)), "") if counts[parent] or not parent)
        found[caller] += count if count > 1 else 0
    return found


def _spans(program: Program, path: str, call: Call | None, observation: Observation) -> dict[int, tuple[int, int]]:
    """When the modules of each step run; the observed calls are those of the program, in its order."""
    place, end = (call.order + 1, call.end) if call is not None else (0, len(observation.calls))
    spans: dict[int, tuple[int, int]] = {}
    number = 0
    for item in program.items:
        part = isinstance(item, Part)
        names = item.modules if isinstance(item, Part) else (str(item.target),) * (item.kind == "call_module")
        for name in names:
            while place < end and observation.calls[place].path != _join(path, name):
                place += 1
            if place < end and part:
                first = spans.get(number, (observation.calls[place].order, 0))[0]
                spans[number] = (first, observation.calls[place].end)
            place = observation.calls[place].end if place < end else place
        number += part
    return spans


@dataclass(frozen=True, slots=True)
class _Step:
    """What one step was seen to do."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    saved: int


def _measure(model: nn.Module, example: Example, programs: Mapping[str, Program]) -> dict[str, dict[int, _Step]]:
    """Run the programs in place of the forwards, and note of each step what it saves; steps that are no good are left out."""
    try:
        empty = each_of(example, partial(torch.empty_like, device="meta"))
        return _measured(meta_copy(model), empty, programs)
    except Exception:  # any operation may lack a meta kernel: the real run decides
        return _measured(copy_with_data(model), example, programs)


def _measured(model: nn.Module, example: Example, programs: Mapping[str, Program]) -> dict[str, dict[int, _Step]]:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.requires_grad_(True)  # a frozen model: what would be saved once it is trained
    counter = _Counter(model)
    trials = {path: _Trial(model.get_submodule(path), program, counter) for path, program in programs.items()}
    for trial in trials.values():
        trial.container.forward = trial
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), saved_tensors_hooks(counter.save, _unread):
        call_with(model, example)
    return {path: trial.found for path, trial in trials.items()}


class _Counter:
    """Counts what autograd saves, each memory once; tensors stay alive, so that identities are not reused."""

    def __init__(self, model: nn.Module) -> None:
        self.saved = 0
        self._alive: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._seen = {tensor.untyped_storage()._cdata for tensor in self._alive}

    def save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            self.saved += storage.nbytes()


def _unread(kept: None) -> Tensor:
    raise RuntimeError("a backward ran within the forward")


class _Trial:
    """Stands in for the forward of a container: runs its program and looks at every step."""

    def __init__(self, container: nn.Module, program: Program, counter: _Counter) -> None:
        self.container, self.program, self.counter = container, program, counter
        self.found: dict[int, _Step] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(self.container, args, kwargs, self._step)

    def _step(self, number: int, part: Part, z: Any, side: tuple[Any, ...]) -> Any:
        before, saved = (z._version if isinstance(z, Tensor) else None), self.counter.saved
        following = part(self.container, z, *side)
        good = isinstance(z, Tensor) and isinstance(following, Tensor) and z._version == before
        if good and (following.shape, following.dtype) == (z.shape, z.dtype) and z.is_floating_point():
            self.found[number] = _Step(tuple(z.shape), z.dtype, self.counter.saved - saved)
        return following
