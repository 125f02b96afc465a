"""Couplings: what is derived from a formula agrees with autograd, and what has no inverse is refused."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import formulas
import pytest
import torch
from torch import exp, nn, tanh

from revify.couplings import ScaleShift, additive, affine, check, damped, derive, half, single, swapped
from revify.couplings.formulas import Formula
from revify.errors import RefusalError


@pytest.mark.parametrize("formula", formulas.DERIVED, ids=lambda formula: formula.__name__)
def test_the_inverse_and_the_determinant_are_derived(formula: Formula) -> None:
    report = check(formula)
    *inverse, determinant = formulas.DERIVED[formula]
    assert str(report.coupling.inverse).splitlines() == inverse
    assert report.coupling.determinant.text == determinant
    assert report.round_trip < 1e-12
    assert report.log_det == pytest.approx(report.numeric_log_det, abs=1e-12)
    assert report.sign == report.numeric_sign
    assert report.sound


@pytest.mark.parametrize(
    "formula",
    [
        formulas.rotation,
        formulas.through_a_letter,
        formulas.shared_sum,
        formulas.negated_difference,
        formulas.Leapfrog(),
        partial(damped, gamma=0.25),
        lambda a, b, F: (-a - F(b), b),
    ],
)
def test_other_ways_to_write_a_coupling_are_sound(formula: Formula) -> None:
    assert check(formula).sound


def test_a_report_prints_the_coupling_and_the_confirmation() -> None:
    assert str(check(damped)).splitlines()[:5] == [
        "damped    y1 = γ·x1 + F(x2)",
        "          y2 = γ·x2 + G(y1)",
        "inverse   x2 = (y2 − G(y1)) / γ",
        "          x1 = (y1 − F(x2)) / γ",
        "det J     γ^2n",
    ]
    assert str(check(damped)).splitlines()[5].startswith("confirmed by numbers: round trip ")


@pytest.mark.parametrize("wrong", [{"round_trip": 1e-3}, {"log_det": 1.0}, {"sign": 1}], ids=str)
def test_a_report_with_wrong_numbers_is_not_sound(wrong: dict[str, float]) -> None:
    report = dataclasses.replace(check(single), **wrong)
    assert not report.sound
    assert "NOT CONFIRMED" in str(report)


def test_check_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check(affine)
    assert torch.equal(torch.rand(4), expected)


def test_streams_that_never_cross_are_reported_as_useless() -> None:
    apart = check(lambda x1, x2: (x2 * 2, -x1))
    assert apart.sound
    assert apart.coupling.remarks == (
        "invertible but useless: the streams never cross, since each output depends on one of them only",
    )
    assert derive(half).remarks == ("y2 is x2 unchanged: let a coupling follow that changes it",)
    assert str(derive(half)).endswith("\nremark    y2 is x2 unchanged: let a coupling follow that changes it")
    assert all(not derive(formula).remarks for formula in (additive, swapped, single, affine, damped))


def test_constants_keep_their_letters_in_the_determinant() -> None:
    assert derive(lambda x1, x2, F, beta=3: (x1 / beta + F(x2), x2 * beta)).determinant.text == "(1 / β)^n · β^n"
    assert derive(partial(damped, gamma=-0.5)).determinant.text == "γ^2n"
    assert derive(lambda x1, x2, F, step=2: (x1 * (1 - step) + F(x2), x2 / step)).determinant.text == (
        "(−1)^n · (1 / step)^n"
    )


def test_a_partial_formula_has_the_name_of_its_function() -> None:
    assert derive(partial(damped, gamma=0.25)).name == "damped"


def test_the_determinant_says_what_an_inverse_needs() -> None:
    def needs(formula):
        determinant = derive(formula).determinant
        return determinant.exact, sum(determinant.residue_bits.values()), determinant.amplification

    assert needs(additive) == (True, 0, 1)
    assert needs(damped) == (True, 2, 2)
    assert needs(partial(damped, gamma=1 / 8)) == (True, 6, 8)
    assert needs(lambda x1, x2, F: (F(x2) - x1 / 4, 2 * x2)) == (True, 2, 4)
    assert needs(formulas.momentum) == (False, 0, pytest.approx(1 / 0.9))
    assert needs(affine) == (False, 0, pytest.approx(math.e))
    assert needs(formulas.squashed) == (False, 1, pytest.approx(3))


def test_the_log_determinant_is_the_same_on_both_ways_and_counts_what_is_broadcast() -> None:
    coupling = derive(lambda x1, x2, F: (x1 * exp(tanh(F(x2))), 0.5 * x2))
    F = lambda x: x.mean(1, keepdim=True)  # noqa: E731
    x1, x2 = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    forward = coupling.forward.run(x1, x2, F)
    inverse = coupling.inverse.run(forward["y1"], forward["y2"], F)
    expected = 3 * tanh(F(x2)).sum() + 24 * math.log(0.5)
    assert torch.allclose(coupling.determinant.log(forward), expected)
    assert torch.allclose(coupling.determinant.log(inverse), expected)


@pytest.mark.parametrize(("shape", "axis"), [((2, 6, 4, 4), 1), ((2, 9, 6), -1), ((2, 4, 4, 6), 3)])
def test_affine_begins_as_additive_and_learns_its_scale(shape: tuple[int, ...], axis: int) -> None:
    F, G = nn.Tanh(), nn.Softsign()
    scaled_F, scaled_G = ScaleShift(F, 6, axis), ScaleShift(G, 6, axis)
    x1, x2 = torch.randn(shape), torch.randn(shape)
    outputs = affine(x1, x2, scaled_F, scaled_G)
    assert all(map(torch.equal, outputs, additive(x1, x2, F, G)))
    sum(y.sum() for y in outputs).backward()
    others = [place for place in range(len(shape)) if place != axis % len(shape)]
    assert torch.allclose(scaled_G.weight.grad, (x2 * G(outputs[0])).sum(others).detach(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        scaled_F.weight.fill_(0.7)
    assert not torch.equal(affine(x1, x2, scaled_F, scaled_G)[0], outputs[0])


def relu_of_a_stream(x1, x2, F):
    y1 = x1 + F(x2)
    y2 = torch.relu(x2) + y1
    return y1, y2


def branch_on_a_value(x1, x2, F):
    if x1 > 0:
        return x1, x2
    return x2, x1


def keyword(x1, x2, F):
    return torch.add(x1, F(x2), alpha=2), x2


def foreign_tensor(x1, x2, F):
    return x1 + F(x2) * torch.ones(3), x2


def breaks(x1, x2, F):
    return x1 + math.exp(x2), x2


def unpacks_once(x1, x2, F):
    s, t = F(x2)
    y1 = x1 + s * F(t)
    return y1, x2


NO_INVERSE = {
    "x2 appears only inside F, so it cannot be solved for": lambda x1, x2, F: (x1 + F(x2), x1),
    "x2 appears only inside F and G, so it cannot be solved for": lambda x1, x2, F, G: (
        x1 + F(x2),
        x1 + G(x2 * 2) + F(x2),
    ),
    "x2 goes into no output, so it is lost": lambda x1, x2, F: (x1 + F(x1), F(x1)),
    "y1 = x1·F(x2) cannot be solved for x1, since the factor F(x2) can be zero or overflow (range −∞ … ∞)": (
        lambda x1, x2, F: (x1 * F(x2), x2)
    ),
    "y1 = x1·exp(F(x2)) cannot be solved for x1, since the factor exp(F(x2)) can be zero or overflow "
    "(range 0 … ∞)": lambda x1, x2, F: (x1 * exp(F(x2)), x2),
    "y1 = x1 / (1 + tanh(F(x2))) cannot be solved for x1, since the factor 1 + tanh(F(x2)) can be zero or "
    "overflow (range 0 … 2)": lambda x1, x2, F: (x1 / (1 + tanh(F(x2))), x2),
    "y1 = x1·0 cannot be solved for x1, since 0 is no factor to divide by": lambda x1, x2: (x1 * 0, x2),
    "y1 = (x1 + x2) / 0 cannot be solved for x1 + x2, since 0 is no factor to divide by": (
        lambda x1, x2: ((x1 + x2) / 0, (x1 - x2) / 0)
    ),
    "y1 = F(x2) / x1 cannot be solved for x1, since it is a divisor": lambda x1, x2, F: (F(x2) / x1, x2),
    "y1 = exp(x1) cannot be solved for x1, since exp gives the same number for many that are far apart": (
        lambda x1, x2, F: (exp(x1), x2)
    ),
    "x1 and x2 cannot be solved for, since no equation has a single unknown: y1 = x1 + F(x2) holds x1 and "
    "F(x2), y2 = x2 + G(x1) holds x2 and G(x1)": lambda x1, x2, F, G: (x1 + F(x2), x2 + G(x1)),
    "x1 cannot be solved for, since no equation has a single unknown: y1 = x1 + F(x1) holds x1 and F(x1)": (
        lambda x1, x2, F: (x1 + F(x1), x2)
    ),
    "x1 and x2 cannot be solved for, since no equation has a single unknown: y1 = x1 + x2 holds x1 and x2, "
    "2·x1 + 2·x2 holds 2·x1 and 2·x2": lambda x1, x2: (x1 + x2, 2 * x1 + 2 * x2 + 1),
}


@pytest.mark.parametrize("reason", NO_INVERSE)
def test_a_formula_without_inverse_is_refused_with_the_reason(reason: str) -> None:
    with pytest.raises(RefusalError) as refusal:
        derive(NO_INVERSE[reason])
    fact, _, remedy = str(refusal.value).partition(": ")[2].partition(f"{reason}. ")
    assert fact == ""
    assert remedy.endswith(".")


NOT_A_FORMULA = {
    "relu is not an operation that can be solved through": (relu_of_a_stream, 2),
    "it decides by the values of a stream (if, while, for, assert)": (branch_on_a_value, 1),
    "add with alpha is not an operation that can be solved through": (keyword, 1),
    "it computes with a Tensor": (foreign_tensor, 1),
    "it does not run on symbols (TypeError: must be real number, not Proxy)": (breaks, 1),
    "getattr is not an operation that can be solved through": (lambda x1, x2, F: (x1 + x2.T, x2), 0),
    "it calls F, but its streams are x1 and F, as many as it returns, and only what follows them is called, "
    "with values": (lambda x1, F: (x1 + F(x1), x1), 0),
    "it calls F with mask=, but": (lambda x1, x2, F: (x1 + F(x2, mask=x2), x2), 0),
    "it computes with F": (lambda x1, x2, F: (x1 + F, x2), 0),
    "it takes single values of F": (lambda x1, x2, F: (x1 + F(x2)[1], x2), 0),
    "it does not unpack F alike in all places": (unpacks_once, 2),
    "it returns 1, which is no stream": (lambda x1, x2, F: (x1, 1), 0),
    "it returns γ, which is no stream": (lambda x1, x2, gamma=2: (x1, gamma), 0),
    "it does not return a value for each stream": (lambda x1, x2: x1 + x2, 0),
    "*x is any number of values": (lambda *x: x, 0),
    "the default of F is None": (lambda x1, x2, F=None: (x1, x2), 0),
    "the default of gamma is True": (lambda x1, x2, gamma=True: (x1 * gamma, x2), 0),
}


@pytest.mark.parametrize("reason", NOT_A_FORMULA)
def test_what_is_no_formula_is_refused_with_its_line(reason: str) -> None:
    formula, line = NOT_A_FORMULA[reason]
    with pytest.raises(RefusalError) as refusal:
        derive(formula)
    where = f"Coupling {formula.__name__} (test_couplings.py, line {formula.__code__.co_firstlineno + line}): "
    assert str(refusal.value).startswith(where + reason)
