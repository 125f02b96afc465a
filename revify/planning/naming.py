"""Modules that a user names → the stages that they form, with the same proofs as those that are found.

A named module need not add to its input: any map of a stream to a stream of its shape can be a step. What is asked for
is done or refused, never left out silently.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from revify.errors import RefusalError
from revify.planning.blocks import ResidualBlock, views_of
from revify.planning.refusals import parents
from revify.planning.repeating import run_twice
from revify.planning.stages import Stage, home_of
from revify.reading.flows import holds_data
from revify.reading.observing import Call, Observation
from revify.reading.roles import Shortcut, find_shortcut
from revify.reading.tracing import Example, Trace


def find_named(
    names: Sequence[str], model: nn.Module, example: Example, observation: Observation, trace: Trace, *, coded: bool
) -> tuple[Stage, ...]:
    """The stages of the modules that have these names, in the order of their calls.

    Args:
        names: paths of modules, or patterns of them: `*` stands for any letters between two dots.
        model: the plain model; it stays as it is.
        example: its inputs.
        observation: of the model on them.
        trace: of the model.
        coded: whether something may lie between the steps.

    Raises:
        RefusalError: a name matches nothing, or a module cannot be a step, or has no other to form a stage with.
    """
    paths = _matching(names, model)
    blocks = [_block(call, trace, names) for call in observation.calls if call.path in paths]
    uncalled = paths - {block.call.path for block in blocks}
    if uncalled:
        raise _refused(names, min(uncalled), "is not called in a forward pass on this example; name what is called")
    stages = tuple(sorted(_grouped(blocks, observation, names, coded=coded), key=lambda stage: stage.start))
    if holds_data(model):
        for path, reason in run_twice(model, example, paths).items():
            raise _refused(names, path, reason)
    return stages


def _matching(names: Sequence[str], model: nn.Module) -> set[str]:
    """The paths of the modules that have one of these names."""
    known = [path for path, _ in model.named_modules() if path]
    found: set[str] = set()
    for name in names:
        matching = [path for path in known if _matches(path, name)]
        if not matching:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
            raise RefusalError(
                f"stages={list(names)}: {type(model).__name__} has no module {name!r}. Some that it has: {', '.join(near)}."
            )
        found.update(matching)
    for path in sorted(found):
        for parent in parents(path):
            if parent in found:
                raise _refused(names, path, f"lies within {parent}, which is named, too; name one of them")
    return found


def _matches(path: str, name: str) -> bool:
    parts, patterns = path.split("."), name.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _block(call: Call, trace: Trace, names: Sequence[str]) -> ResidualBlock:
    """A call as a step of a stage."""
    if any(i.changed for i in call.inputs):
        raise _refused(names, call.path, "changes its input in place; make its first operation out of place")
    calls = trace.calls.get(call.path, [])
    found: list[ResidualBlock] = []
    for result, view in views_of(call):
        for stream in view.inputs:
            if (stream.shape, stream.dtype) == (view.shape, view.dtype) and stream.dtype.is_floating_point:
                only = calls[0] if len(calls) == 1 else None
                shortcut = only and find_shortcut(only.given(stream.argument), only.result(result), trace.modules)
                found.append(ResidualBlock(view, stream, shortcut or Shortcut.NONE, result))
    if not found:
        raise _refused(names, call.path, f"does not keep the shape of what it is given: {_shapes(call)}")
    return next((block for block in found if block.shortcut is not Shortcut.NONE), found[0])


def _shapes(call: Call) -> str:
    given = ", ".join(str(list(i.shape)) for i in call.inputs) or "no tensor"
    returned = ", ".join(str(list(view.shape)) for _, view in views_of(call)) or "none"
    return f"{given} to {returned}"


def _grouped(
    blocks: list[ResidualBlock], observation: Observation, names: Sequence[str], *, coded: bool
) -> Iterator[Stage]:
    """Chains, in which each block is given what the one before returned; what is left, by shape."""
    counts = Counter(block.call.path for block in blocks)
    runs: list[list[ResidualBlock]] = []
    for block in blocks:
        last = runs[-1][-1] if runs else None
        if last is not None and block.continues(last) and counts[block.call.path] == counts[last.call.path] == 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    for kind in dict.fromkeys((run[0].call.shape, run[0].call.dtype) for run in runs):
        alike = [run for run in runs if (run[0].call.shape, run[0].call.dtype) == kind]
        single = [block for run in alike if len(run) == 1 for block in run]
        if len(single) == 1:  # it goes with the others of its shape
            single = [block for run in alike for block in run]
        elif single:
            yield from (Stage(tuple(run)) for run in alike if len(run) > 1)
        else:
            yield from (Stage(tuple(run)) for run in alike)
            continue
        if len(single) == 1:
            shape = "×".join(map(str, kind[0][1:]))
            raise _refused(
                names, single[0].call.path, f"is the only one of them with a stream of {shape}; a stage has two"
            )
        if not coded:
            reason = (
                "is not given what the named module before it returned, which the recurrence needs; let step= be coded"
            )
            raise _refused(names, single[1].call.path, reason)
        yield Stage(tuple(single), home_of([block.call.path for block in single], observation))


def _refused(names: Sequence[str], path: str, reason: str) -> RefusalError:
    return RefusalError(f"stages={list(names)}: {path} {reason}. Otherwise leave it out.")
