"""A formula → its inverse and determinant (`derive`), confirmed with numbers (`check`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from revify.couplings.determinants import Determinant, determinant
from revify.couplings.explaining import Stuck
from revify.couplings.formulas import Formula, name_of, record, refusal
from revify.couplings.programs import Apply, Op, Program
from revify.couplings.solving import solve


@dataclass(frozen=True, slots=True)
class Coupling:
    """A formula and what was derived from it.

    Attributes:
        name: the name of the formula.
        forward: `forward(x1, x2, *branches)` gives the outputs.
        inverse: `inverse(y1, y2, *branches)` gives the inputs, with the same calls of branches as forward.
        determinant: det J of the outputs by the inputs.
        remarks: what makes it of little use, although it has an inverse.
    """

    name: str
    forward: Program
    inverse: Program
    determinant: Determinant
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        rows = {self.name: str(self.forward), "inverse": str(self.inverse), "det J": self.determinant.text}
        rows |= {"remark": "\n".join(self.remarks)} if self.remarks else {}
        width = max(map(len, rows)) + 3
        indent = "\n" + width * " "
        return "\n".join(name.ljust(width) + text.replace("\n", indent) for name, text in rows.items())


def derive(formula: Formula) -> Coupling:
    """The inverse and the determinant of a coupling, derived from its formula.

    The formula is run once on symbols and solved for its inputs. Nothing is computed with numbers.

        >>> from revify.couplings import additive
        >>> coupling = derive(additive)
        >>> F = G = torch.tanh
        >>> x1, x2 = torch.ones(3), torch.zeros(3)
        >>> y1, y2 = coupling.forward(x1, x2, F, G)
        >>> coupling.inverse(y1, y2, F, G)
        (tensor([1., 1., 1.]), tensor([0., 0., 0.]))

    Args:
        formula: streams, then branches, then constants (numbers as defaults) → as many streams. It may use +,
            −, *, /, exp, tanh, sigmoid, and calls of its branches, which give one value or a tuple.

    Returns:
        The formula as a program, the program of its inverse, and its determinant.

    Raises:
        RefusalError: the formula uses something else, or has no inverse; the text says what and where.
    """
    forward = record(formula)
    solution = solve(forward)
    if isinstance(solution, Stuck):
        raise refusal(formula, solution.fact, solution.remedy)
    det = determinant(forward, solution)
    return Coupling(name_of(formula), forward, solution.inverse, det, tuple(_remarks(forward)))


def _remarks(forward: Program) -> Iterator[str]:
    """What makes a coupling that has an inverse of little use."""
    sources = forward.sources()
    if all(len(sources[y]) == 1 for y in forward.outputs):
        yield "invertible but useless: the streams never cross, since each output depends on one of them only"
        return
    for x, y in zip(forward.inputs, forward.outputs, strict=True):
        if Apply(y, Op.SAME, (x,)) in forward.instructions:
            yield f"{y} is {x} unchanged: let a coupling follow that changes it"


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found, in float64 with random smooth branches; it prints as a table.

    Attributes:
        coupling: what was derived.
        round_trip: the largest |inverse(formula(x)) − x|.
        log_det: log |det J| as derived.
        numeric_log_det: log |det J| of the Jacobian that autograd gives.
        sign: the sign of det J as derived, for an odd number of elements.
        numeric_sign: the sign of det J of that Jacobian.
    """

    coupling: Coupling
    round_trip: float
    log_det: float
    numeric_log_det: float
    sign: int
    numeric_sign: int

    @property
    def sound(self) -> bool:
        """Whether the numbers confirm what was derived, to 1e-9."""
        off = max(self.round_trip, abs(self.log_det - self.numeric_log_det))
        return off < TOLERANCE and self.sign == self.numeric_sign

    def __str__(self) -> str:
        off, sign = abs(self.log_det - self.numeric_log_det), self.sign == self.numeric_sign
        return (
            f"{self.coupling}\n{'confirmed' if self.sound else 'NOT CONFIRMED'} by numbers: round trip "
            f"{self.round_trip:.0e}, log |det J| off by {off:.0e}, sign {'right' if sign else 'wrong'}"
        )


ELEMENTS, TOLERANCE = 7, 1e-9  # an odd number of elements, so that a sign of (−1)^n shows


def check(formula: Formula) -> Report:
    """Confirm with numbers what is derived from a formula.

    Streams and branches are random, from a generator of its own.

        >>> from revify.couplings import single
        >>> print(check(single))
        single    y1 = x2 + G(x1)
                  y2 = x1
        inverse   x1 = y2
                  x2 = y1 − G(x1)
        det J     (−1)^n
        confirmed by numbers: round trip ..., log |det J| off by ..., sign right

    Args:
        formula: as for `derive`.

    Returns:
        The derived coupling, the error of a round trip, and det J as derived and of the actual Jacobian.

    Raises:
        RefusalError: as `derive` does.
    """
    coupling = derive(formula)
    forward, generator = coupling.forward, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    streams = tuple(random(ELEMENTS) for _ in forward.inputs)
    branches = [_smooth_branch(count, random) for count in forward.gives.values()]
    outputs = formula(*(x.clone() for x in streams), *branches)
    returned = coupling.inverse(*outputs, *branches)
    stacked = torch.func.jacrev(lambda x: torch.cat(formula(*x.chunk(len(streams)), *branches)))
    sign, log_det = torch.linalg.slogdet(stacked(torch.cat(streams)))
    return Report(
        coupling,
        round_trip=max(float((a - b).abs().max()) for a, b in zip(returned, streams, strict=True)),
        log_det=float(coupling.determinant.log(forward.run(*streams, *branches))),
        numeric_log_det=float(log_det),
        sign=-1 if coupling.determinant.odd else 1,
        numeric_sign=int(sign),
    )


def _smooth_branch(results: int, random: Callable[..., Tensor]) -> Callable[..., object]:
    """A small random network of any number of streams."""
    inner, outer = random(ELEMENTS, ELEMENTS), random(results, ELEMENTS, ELEMENTS)

    def branch(*values: Tensor) -> object:
        mixed = sum((place * value for place, value in enumerate(values, 1)), torch.zeros_like(inner[0]))
        given = (torch.tanh(mixed @ inner) @ outer).unbind()
        return given if results > 1 else given[0]

    return branch
