"""Calls with something between them → stages of coded steps, each of which codes what it is given.

Such calls are of two kinds: residual blocks to whose stream something else is done on the way to the next, and the branches
that a loop adds, in a module whose forward cannot be cut into steps (`containers`), since torch.fx does not trace it.

    x[0] ── branch 0 ──(+)── x[1] ── branch 1 ──(+)── x[2]        what is coded are x[1] − x[0], x[2] − x[1], …
      └────────────────┘ └───────────────────────┘
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from revify.planning.blocks import ResidualBlock, views_of
from revify.planning.refusals import parents
from revify.planning.stages import Stage, home_of
from revify.reading.additions import count_additions
from revify.reading.chains import FEWEST
from revify.reading.observing import Call, Observation
from revify.reading.roles import Role, Shortcut, find_shortcut, follows, role_of_module
from revify.reading.tracing import Trace, TracedCall

OPEN = 8  # runs of one kind that a step may go on with: those that were gone on with last
Kind = tuple[str, tuple[int, ...], torch.dtype]  # of a stream: where its calls are, its shape and type


def find_apart(
    blocks: Collection[ResidualBlock],
    chains: Collection[Stage],
    cut: Collection[str],
    observation: Observation,
    trace: Trace,
    modules: dict[str, nn.Module],
) -> tuple[Stage, ...]:
    """The runs of such calls, in the order of their first ones.

    Args:
        blocks: residual ones.
        chains: runs of them without anything in between.
        cut: the paths of modules whose forwards are cut into steps.
        observation: of the model.
        trace: of the model.
        modules: the model's modules by path.
    """
    known = {chain.paths for chain in chains}
    residual = {block.call.path: block for block in blocks}
    steps = list(_steps(observation, trace, residual))
    whole = [step for step in steps if step.block.shortcut is not Shortcut.NONE]
    at_one_depth = _runs(whole, trace, lambda step: str(step.block.call.path.count(".")), by_value=True)
    alike = Counter((step.caller, step.block.call.kind) for step in steps)
    siblings = [
        s for s in steps if s.caller not in cut and alike[s.caller, s.block.call.kind] > 1 and _learns(modules, s)
    ]
    norms = {step.block.call.path for step in siblings if _normalises(modules, step)}  # a stream of their own
    linked = _runs(siblings, trace, lambda s: f"{s.caller} {s.block.call.path in norms}", by_value=True)
    loops = {path for path, count in count_additions(trace).items() if count >= FEWEST}
    done = {id(step) for run in linked for step in run}
    rest = [
        step
        for step in siblings
        if step.caller in loops
        and alike[step.caller, step.block.call.kind] >= FEWEST
        and id(step) not in done
        and step.block.call.path not in norms
    ]
    unlike = _runs(rest, trace, lambda step: step.caller, by_value=False)
    found: list[Stage] = []
    for run in (*at_one_depth, *linked, *unlike):
        own = Counter(step.block.call.path for step in run)
        whole_run = [step for step in run if own[step.block.call.path] == len(trace.calls[step.block.call.path])]
        if len(whole_run) >= FEWEST and whole_run[0].lasting:
            stage = Stage(tuple(s.block for s in whole_run), home_of(list(own), observation))
            if stage.paths not in known:
                known.add(stage.paths)
                found.append(stage)
    return tuple(sorted(found, key=lambda stage: stage.start))


@dataclass(frozen=True, slots=True)
class _Step:
    """A call that could be a step.

    Args:
        block: the call, with its first input that can be a stream.
        given: that input in the graph.
        returned: what it returned there, None where that is not one value.
        caller: the path of the module that calls it.
        lasting: whether nothing changes its input in place later.
    """

    block: ResidualBlock
    given: fx.Node
    returned: fx.Node | None
    caller: str
    lasting: bool


def _steps(observation: Observation, trace: Trace, residual: Mapping[str, ResidualBlock]) -> Iterator[_Step]:
    counts = Counter(call.path for call in observation.calls)
    place: Counter[str] = Counter()
    for call in observation.calls:
        traced = trace.calls.get(call.path, [])
        number, place[call.path] = place[call.path], place[call.path] + 1
        if number >= len(traced) or any(i.changed for i in call.inputs) or not call.saved_bytes:
            continue
        block = residual.get(call.path)
        if block is None or (block.result and block.stream is not call.inputs[0]):  # what it hands on beside the stream
            block = _as_step(call, traced[number], trace)
        given = block and traced[number].given(block.stream.argument)
        if block is None or not isinstance(given, fx.Node):
            continue
        returned = traced[number].result(block.result)
        caller = next((parent for parent in reversed(parents(call.path)) if counts[parent]), "")
        lasting = block.stream.key not in observation.passing
        yield _Step(block, given, returned if isinstance(returned, fx.Node) else None, caller, lasting)


def _as_step(call: Call, traced: TracedCall, trace: Trace) -> ResidualBlock | None:
    """A call with the first tensor of real numbers that it is given, to which it may add; None without one."""
    for stream in call.inputs:
        given = traced.given(stream.argument)
        if stream.dtype.is_floating_point and isinstance(given, fx.Node):
            for result, view in views_of(call):
                alike = (stream.shape, stream.dtype) == (view.shape, view.dtype)
                if alike and len(trace.calls[call.path]) > 1 and list(trace.modules[call.path].children()):
                    shortcut = find_shortcut(given, traced.result(result), trace.modules)
                    if shortcut is not None:
                        return ResidualBlock(view, stream, shortcut, result)
            return ResidualBlock(call, stream, Shortcut.NONE)
    return None


def _runs(steps: Iterable[_Step], trace: Trace, where: Callable[[_Step], str], *, by_value: bool) -> list[list[_Step]]:
    """The steps of one place and one shape; `by_value` says whether each must be given what follows from the one before."""
    runs: dict[Kind, list[list[_Step]]] = defaultdict(list)
    for step in steps:
        stream = step.block.stream
        known = runs[where(step), stream.shape, stream.dtype]
        for run in reversed(known[-OPEN:]):
            if not by_value or _follows(step, run[-1], trace):
                run.append(step)
                known.append(known.pop(known.index(run)))
                break
        else:
            known.append([step])
    return [run for found in runs.values() for run in found if len(run) > 1]


def _follows(step: _Step, other: _Step, trace: Trace) -> bool:
    """Whether a step is given what the other was given, or returned with that in it, after something was done to it."""
    if other.block.shortcut is Shortcut.NONE or other.returned is None:
        return follows(other.given, step.given, trace.modules, added=True)
    return follows(other.returned, step.given, trace.modules, added=False)


def _learns(modules: dict[str, nn.Module], step: _Step) -> bool:
    return next(modules[step.block.call.path].parameters(), None) is not None


def _normalises(modules: dict[str, nn.Module], step: _Step) -> bool:
    return role_of_module(modules[step.block.call.path]) is Role.NORMALISE
