"""Explaining: why the inputs of a formula cannot be found from its outputs, in the letters of the formula."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from revify.couplings.intervals import Interval
from revify.couplings.programs import Apply, Call, Op, Program, Rendering, names, render


@dataclass(frozen=True, slots=True)
class Stuck:
    """Why there is no inverse, and what would help."""

    fact: str
    remedy: str


def explain(forward: Program, solved: Iterable[str], known: Set[str], bounds: Mapping[str, Interval]) -> Stuck:
    """Why no further value can be solved for.

    Args:
        forward: the program of the formula.
        solved: the known values whose definition holds unknowns, or could.
        known: all values that are known.
        bounds: where each value can lie.

    Returns:
        The first that holds: a stream is hidden in branches; a factor can be zero; all unknowns are mixed.
    """
    open_to_outputs = _without_branches(forward, forward.outputs)
    for name in forward.inputs:
        if name not in open_to_outputs:
            return _hidden(name, forward)
    text = render(forward)
    definitions = {step.result: step for step in forward.instructions if isinstance(step, Apply)}
    mixtures = []
    for value in solved:
        step = definitions.get(value)
        unknowns = [name for name in names(step.operands) if name not in known] if step else []
        if step and unknowns:
            formula, named = text.formulas[value], text.mentions[value] == value
            equation = f"{value} = {formula}" if named else formula
            if len(unknowns) == 1:
                return _blocked(step, unknowns[0], equation, text, bounds)
            mixtures.append(f"{equation} holds {' and '.join(text.mentions[name] for name in unknowns)}")
    lost = " and ".join(name for name in forward.inputs if name not in known)
    return Stuck(
        f"{lost} cannot be solved for, since no equation has a single unknown: {', '.join(mixtures)}",
        "Update one stream at a time, by a branch of what is known by then, as in y2 = x2 + G(y1).",
    )


def _hidden(stream: str, forward: Program) -> Stuck:
    """No output depends on the stream other than through a branch."""
    calls = [step for step in forward.instructions if isinstance(step, Call)]
    inside = [step.branch for step in calls if stream in _without_branches(forward, names(step.operands))]
    if inside:
        return Stuck(
            f"{stream} appears only inside {' and '.join(dict.fromkeys(inside))}, so it cannot be solved for",
            f"Let an output hold it outside of the branch as well, for example y2 = {stream}.",
        )
    return Stuck(f"{stream} goes into no output, so it is lost", f"Hand it on, for example as y2 = {stream}.")


def _blocked(step: Apply, unknown: str, equation: str, text: Rendering, bounds: Mapping[str, Interval]) -> Stuck:
    """The step has a single unknown, but no operation gives that back."""
    solve = f"{equation} cannot be solved for {text.mentions[unknown]}, since"
    if step.op is Op.MULTIPLY or (step.op is Op.DIVIDE and step.operands[0] == unknown):
        (factor,) = (operand for operand in step.operands if operand != unknown)
        if not isinstance(factor, str):
            return Stuck(f"{solve} {factor.text} is no factor to divide by", "Take one away from 0 and ∞.")
        return Stuck(
            f"{solve} the factor {text.mentions[factor]} can be zero or overflow (range {bounds[factor]})",
            "Keep it away from 0 and ∞ whatever the branch gives, as exp(tanh(s)) does"
            + (", or let every run look: guarded(exp(s))." if bounds[factor].guarded().invertible else "."),
        )
    if step.op is Op.DIVIDE:
        return Stuck(f"{solve} it is a divisor", "Divide a stream by a bounded factor, not by a stream.")
    return Stuck(
        f"{solve} {step.op.name.lower()} gives the same number for many that are far apart",
        f"Use {step.op.name.lower()} on what a branch gives, not on a stream.",
    )


def _without_branches(program: Program, values: Iterable[str]) -> set[str]:
    """The values, and all that they are computed from without a branch between."""
    found = set(values)
    for step in reversed(program.instructions):
        if isinstance(step, Apply) and step.result in found:
            found.update(names(step.operands))
    return found
