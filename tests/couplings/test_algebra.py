"""The algebra under the couplings: random formulas, how they print, where values can lie."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random

import formulas
import pytest
import torch

from revify.couplings import additive, affine, check, damped, derive, half
from revify.couplings.formulas import record
from revify.couplings.intervals import LINE, Interval
from revify.couplings.programs import Apply, Call, Op
from revify.errors import RefusalError, RevifyError


@pytest.mark.parametrize("seed", range(60))
def test_random_reversible_formulas_are_solved_soundly(seed: int) -> None:
    report = check(formulas.reversible_formula(seed))
    assert report.sound, str(report)


def test_a_random_formula_is_refused_or_solved_soundly() -> None:
    refused, sound = 0, []
    for seed in range(600):
        try:
            sound.append(check(formulas.any_formula(seed)).sound)
        except RefusalError:
            refused += 1
    assert refused > 100
    assert len(sound) > 50
    assert all(sound)


def test_formulas_print_with_the_parentheses_they_need() -> None:
    def tangled(a, b, F, gamma=3):
        c = -(a + -b) - (b - F(-a * b)) * 2
        return c - (-F(c)), b / gamma / (gamma * -2)

    assert str(record(tangled)).splitlines() == [
        "c = −(a + (−b)) − (b − F((−a)·b))·2",
        "y1 = c − (−F(c))",
        "y2 = b / γ / (γ·(−2))",
    ]


def test_what_the_outputs_do_not_need_is_left_out() -> None:
    def with_a_detour(x1, x2, F):
        torch.relu(F(x1))
        return x1 + F(x2), x2

    assert str(derive(with_a_detour).forward) == str(derive(half).forward)


def test_inverse_instructions_undo_or_repeat_those_of_the_formula_under_the_same_names() -> None:
    coupling = derive(damped)
    forward = {step.results: step for step in coupling.forward.instructions}
    undone = [step.undoes for step in coupling.inverse.instructions if isinstance(step, Apply)]
    assert undone == ["y2", "v3", "y1", "v1"]
    assert all(forward[(name,)].op in (Op.ADD, Op.MULTIPLY) for name in undone)
    calls = [step for step in coupling.inverse.instructions if isinstance(step, Call)]
    assert [step.branch for step in calls] == ["G", "F"]
    assert all(step == forward[step.results] for step in calls)


def test_a_branch_whose_result_does_not_fit_is_an_error() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(RevifyError, match=r"Branch F gave a Tensor where the coupling takes s, t: pass one that"):
        derive(affine).forward(x, x, torch.tanh, torch.tanh)
    with pytest.raises(RevifyError, match=r"Branch F gave a tuple of 2 where the coupling takes v1: pass"):
        derive(additive).forward(x, x, lambda x: (x, x), torch.tanh)
    with pytest.raises(RevifyError, match=r"Got 3 arguments for \(x1, x2, F, G\)"):
        derive(additive).forward(x, x, torch.tanh)


def test_a_coupling_can_be_copied_and_pickled() -> None:
    coupling = derive(affine)
    assert copy.deepcopy(coupling) == coupling
    assert pickle.loads(pickle.dumps(coupling)) == coupling


def test_an_interval_holds_what_the_operation_gives_for_the_numbers_in_it() -> None:
    draw = random.Random(0)
    unary = {Op.NEGATE, Op.EXP, Op.TANH, Op.SIGMOID}
    for _ in range(500):
        ranges = [Interval(*sorted((draw.uniform(-3, 3), draw.uniform(-3, 3)))) for _ in range(2)]
        for op in set(Op) - {Op.SAME}:
            operands = ranges[: 1 if op in unary else 2]
            bounds = op.compute(*operands)
            for _ in range(5):
                inside = [torch.tensor(draw.uniform(r.low, r.high), dtype=torch.float64) for r in operands]
                value = float(op.compute(*inside))
                assert bounds.low - 1e-9 <= value <= bounds.high + 1e-9, (op, operands, inside)
            if op is not Op.DIVIDE:  # whose ends may lie beyond those of the operands
                ends = itertools.product(*((end.low, end.high) for end in operands))
                corners = [float(op.compute(*(torch.tensor(e, dtype=torch.float64) for e in at))) for at in ends]
                assert (bounds.low, bounds.high) == pytest.approx((min(corners), max(corners)))


@pytest.mark.parametrize(
    ("bounds", "invertible"),
    [
        (Interval(0.5, 2), True),
        (Interval(-3, -1e-30), True),
        (Interval(-1, 1), False),
        (Interval(0, 1), False),
        (Interval(1e-40, 1), False),
        (Interval(1, math.inf), False),
        (LINE.exp(), False),
        (LINE.sigmoid(), False),
        (LINE.tanh().exp(), True),
        (LINE.tanh() + 1, False),
        (1.5 - LINE.sigmoid(), True),
        (1 / (LINE.tanh() - 2), True),
        (0 * LINE + 1, True),
    ],
    ids=str,
)
def test_only_a_range_without_zero_and_overflow_is_invertible(bounds: Interval, invertible: bool) -> None:
    assert bounds.invertible == invertible
