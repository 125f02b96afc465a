"""Elimination: values that mix unknowns linearly → the instructions that take one of them apart.

    p = a + b      q = a − b = p − 2·b      b = (q − p) / (−2)

after which p has a single unknown, a.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set

from revify.couplings.programs import Apply, Constant, Instruction, Op, Operand, names, number

Form = dict[Operand, float]  # Σ coefficient · operand
NEGLIGIBLE = 1e-12  # a coefficient that has cancelled
Definitions = Mapping[str, Instruction]  # the instruction that computes each value


def eliminate(values: Sequence[str], definitions: Definitions, known: Set[str]) -> list[Apply]:
    """Solve a value for an unknown, with the help of at most one value before it.

    Args:
        values: known values, each before those that are computed from it.
        definitions: the instruction for each value of the formula.
        known: all values that are known.

    Returns:
        The instructions, of which the last gives the unknown, by dividing by its coefficient. Empty where no
        value leaves a single unknown.
    """
    uses = Counter(name for name in definitions for name in names(definitions[name].operands))
    shared = {name for name, count in uses.items() if count > 1}
    for whole in (known | shared, known):  # unfold a value that is used twice only if it has to be
        forms = {value: _linear_form(value, definitions, whole) for value in values}
        for p, q in itertools.combinations(["", *values], 2):  # "": q alone
            for form in _substitutions(forms[q], p, forms[p]) if p else [forms[q]]:
                unknowns = [operand for operand in names(form) if operand not in known]
                if len(unknowns) == 1:
                    return _solution(q, unknowns[0], form, taken=definitions.keys() | known)
    return []


def _linear_form(value: str, definitions: Definitions, whole: Set[str]) -> Form:
    """A value as a linear combination of values that are to stay whole, are inputs, or are not linear."""
    match definitions.get(value):
        case Apply(op=Op.SAME, operands=(a,)):
            terms = [(1.0, a)]
        case Apply(op=Op.NEGATE, operands=(a,)):
            terms = [(-1.0, a)]
        case Apply(op=Op.ADD, operands=(a, b)):
            terms = [(1.0, a), (1.0, b)]
        case Apply(op=Op.SUBTRACT, operands=(a, b)):
            terms = [(1.0, a), (-1.0, b)]
        case Apply(op=Op.MULTIPLY, operands=(a, Constant(value=c)) | (Constant(value=c), a)):
            terms = [(c, a)]
        case Apply(op=Op.DIVIDE, operands=(a, Constant(value=c))) if c:
            terms = [(1 / c, a)]
        case _:
            return {value: 1.0}
    form: Form = {}
    for c, a in terms:
        leaf = isinstance(a, Constant) or a in whole
        form = _sum(form, c, {a: 1.0} if leaf else _linear_form(str(a), definitions, whole))
    return form


def _substitutions(form: Form, p: str, of_p: Form) -> Iterator[Form]:
    """The form with k·p for the k·`of_p` in it, once for each operand that this can remove."""
    for operand in [operand for operand in form if operand in of_p]:
        k = form[operand] / of_p[operand]
        yield _sum(_sum(form, -k, of_p), k, {p: 1.0})


def _sum(form: Form, factor: float, other: Form) -> Form:
    total = {operand: form.get(operand, 0.0) + factor * other.get(operand, 0.0) for operand in form | other}
    return {operand: c for operand, c in total.items() if abs(c) > NEGLIGIBLE}


def _solution(value: str, unknown: str, form: Form, taken: Set[str]) -> list[Apply]:
    """value = form, solved for the unknown: (value − all other terms) / its coefficient."""
    fresh = (name for name in map("w{}".format, itertools.count(1)) if name not in taken)
    steps, left = [], value
    for operand, c in form.items():
        if operand == unknown:
            continue
        if abs(c) != 1:
            steps.append(Apply(next(fresh), Op.MULTIPLY, (number(abs(c)), operand)))
            operand = steps[-1].result
        steps.append(Apply(next(fresh), Op.SUBTRACT if c > 0 else Op.ADD, (left, operand)))
        left = steps[-1].result
    return [*steps, Apply(unknown, Op.DIVIDE, (left, number(form[unknown])), undoes=value)]
