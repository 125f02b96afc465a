"""A coupling → its parts, each with one branch; and couplings by name.

    y1 = x1 + F(x2)                y1 = x1 + F(x2)          (x1, x2) → (y1, x2)
    y2 = x2 + G(y1)       →        y2 = x2 + G(y1)          (y1, x2) → (y1, y2)

In a model the branches of a coupling belong to blocks that are called one after the other. A part is what one of them
does: it takes two streams and leaves two streams, and its inverse is derived from itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from revify.couplings.deriving import Coupling, derive
from revify.couplings.determinants import determinant
from revify.couplings.explaining import Stuck
from revify.couplings.formulas import Formula, function_of, name_of
from revify.couplings.programs import Apply, Call, Program, names
from revify.couplings.shipped import additive, affine, damped, half, single, swapped
from revify.couplings.solving import solve
from revify.errors import RefusalError

SHIPPED: tuple[Formula, ...] = (additive, affine, damped, half, single, swapped)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one branch of a stage does to the two halves of its channels.

    Args:
        part: the coupling that it is in.
        letter: of the branch.
        before: which half of the channels, 0 or 1, each input stream of the part holds.
        after: likewise of its outputs.
        takes: the half that the branch is given.
        gives: the half to which its result belongs.
        results: how many values the branch gives.
    """

    part: Coupling
    letter: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    takes: int
    gives: int
    results: int


def half_range(half: int, channels: int) -> slice:
    """The channels of a half; of an odd number the first half has one more."""
    middle = channels - channels // 2
    return slice(0, middle) if half == 0 else slice(middle, channels)


def turns(formula: Formula, count: int) -> tuple[Turn, ...]:
    """What each of `count` branches in a row does, the coupling being used again and again.

    Raises:
        RefusalError: the coupling has no inverse, or cannot be parted into one branch each.
    """
    parts = part(derive(formula))
    found: list[Turn] = []
    halves: tuple[int, ...] = (0, 1)
    for number in range(count):
        found.append(_turn(parts[number % len(parts)], halves))
        halves = found[-1].after
    return tuple(found)


def part(coupling: Coupling) -> tuple[Coupling, ...]:
    """The coupling as couplings with one branch each, to be used one after the other.

    Raises:
        RefusalError: between two branches there are more values than streams.
    """
    programs = tuple(_programs(coupling))
    if not programs:
        raise _refusal(coupling.name, "it has no branch")
    found = []
    for number, program in enumerate(programs):
        solution = solve(program)
        if isinstance(solution, Stuck):
            raise _refusal(
                coupling.name, f"what its branch {program.branches[0]} does cannot be undone: {solution.fact}"
            )
        name = coupling.name if len(programs) == 1 else f"{coupling.name}, part {number}"
        found.append(Coupling(name, program, solution.inverse, determinant(program, solution), ()))
    return tuple(found)


def coupling_name(formula: Formula) -> str:
    """The name under which a plan keeps a coupling: that of a shipped one, or module:function of your own.

    A name is text, which nobody imports: whoever applies the plan of a coupling of their own holds its formula.
    """
    if any(formula is shipped for shipped in SHIPPED):
        return name_of(formula)
    function = function_of(formula)
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def find_coupling(name: str, own: Iterable[Formula] = ()) -> Formula:
    """The coupling of a name that `coupling_name` gave.

    Args:
        name: of a shipped coupling, or module:function, of which the function counts: modules have other names when they
            are run as scripts.
        own: the formulas among which the latter is looked for.

    Raises:
        RefusalError: there is none, or more than one.
    """
    if ":" not in name:
        found = [shipped for shipped in SHIPPED if name_of(shipped) == name]
        if not found:
            raise _unknown(name, f"revify.couplings has none of this name, but {', '.join(map(name_of, SHIPPED))}")
        return found[0]
    wanted = name.rpartition(":")[2]
    held = {id(formula): formula for formula in own}
    matching = [formula for formula in held.values() if coupling_name(formula).rpartition(":")[2] == wanted]
    if len(matching) > 1:
        raise _unknown(name, f"{len(matching)} of the couplings given are called {wanted}")
    if not matching:
        raise _unknown(name, "it is none of revify.couplings, and revify imports nothing that a file or a plan names")
    return matching[0]


def _programs(coupling: Coupling) -> Iterator[Program]:
    """The instructions from each branch up to the next, with the streams that lie between them."""
    whole = coupling.forward
    calls = [place for place, step in enumerate(whole.instructions) if isinstance(step, Call)]
    streams = whole.inputs
    for number, start in enumerate(calls):
        stop = calls[number + 1] if number + 1 < len(calls) else len(whole.instructions)
        own = whole.instructions[start if number else 0 : stop]
        rest = whole.instructions[stop:]
        wanted = {name for step in rest for name in names(step.operands)} | set(whole.outputs)
        known = {*streams, *(result for step in own for result in step.results)}
        left = whole.outputs if not rest else _in_place(streams, [name for name in known if name in wanted])
        if len(left) != len(streams):
            raise _refusal(
                coupling.name,
                f"after its branch {_letter(own)} there are {len(left)} values, not {len(streams)} streams",
            )
        yield Program(streams, (_letter(own),), own, left, whole.guarded)
        streams = left


def _in_place(streams: tuple[str, ...], live: list[str]) -> tuple[str, ...]:
    """The live values, those that were streams already in their places."""
    new = sorted(name for name in live if name not in streams)
    kept = [name if name in live else (new.pop(0) if new else "") for name in streams]
    return (*(name for name in kept if name), *new)


def _letter(instructions: tuple[Call | Apply, ...]) -> str:
    return next(step.branch for step in instructions if isinstance(step, Call))


def _turn(part: Coupling, before: tuple[int, ...]) -> Turn:
    """Follow the halves through a part: operations keep the shape of what they work on."""
    program = part.forward
    call = next(step for step in program.instructions if isinstance(step, Call))
    halves: dict[str, int] = dict(zip(program.inputs, before, strict=True))
    together = [{step.result, *names(step.operands)} for step in program.instructions if isinstance(step, Apply)]
    for _ in together:  # as often as it can take to spread through all of them
        for group in together:
            known = {halves[name] for name in group if name in halves}
            halves.update(dict.fromkeys(group, min(known)) if known else {})
    given = names(call.operands)
    takes, gives = halves.get(given[0]), halves.get(call.results[0])
    if len(given) != 1 or takes is None or gives is None or takes == gives:
        raise _refusal(part.name, f"branch {call.branch} is to be given one stream, and its result added to the other")
    after = tuple(halves[name] for name in program.outputs)
    return Turn(part, call.branch, before, after, takes, gives, len(call.results))


def _refusal(name: str, fact: str) -> RefusalError:
    return RefusalError(
        f"{name}: {fact}. In a converted model each block runs one branch between two streams; use one of revify.couplings, "
        "or revify.Reversible, which runs all branches at once."
    )


def _unknown(name: str, fact: str) -> RefusalError:
    return RefusalError(
        f"the coupling {name!r} is not known: {fact}. Give the formula itself: revify.load(file, couplings=[mine]), "
        "Plan.from_json(text, couplings=[mine])."
    )
