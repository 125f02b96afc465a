"""Couplings: what is derived from a formula agrees with autograd, and what has no inverse is refused."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import itertools
import math
import pickle
import random
from collections import Counter
from functools import partial

import pytest
import torch
from torch import exp, nn, tanh

from revify import couplings
from revify.algebra.formulas import record
from revify.algebra.intervals import LINE, Interval
from revify.algebra.programs import Apply, Call, Op, names
from revify.couplings import (
    ScaleShift,
    additive,
    affine,
    check,
    damped,
    derive,
    half,
    single,
    swapped,
)
from revify.errors import RefusalError, RevifyError

# ---------------------------------------------------------------------------------- formulas of our own


def leapfrog(x1, x2, F):
    return x2, x1 + 2 * F(x2)


def momentum(x, v, f, gamma=0.9):
    """Sander et al. 2021, Momentum residual networks (arXiv 2102.07870)."""
    v = gamma * v + (1 - gamma) * f(x)
    return x + v, v


def sums_and_differences(x1, x2):
    return x1 + x2, x1 - x2


def rotation(x1, x2, F):
    y1 = 0.6 * x1 + 0.8 * x2
    y2 = 0.6 * x2 - 0.8 * x1
    return y1 + F(y2), y2


def round_robin(x1, x2, x3, F, G):
    y1 = x1 + F(x2, x3)
    y2 = x2 + G(x3, y1)
    return y2, x3, y1


def squashed(x1, x2, F, G):
    scale = 2 + F(x2).tanh()
    y1 = x1 / scale
    y1 += scale
    return y1, -0.5 * (1 - x2) - torch.sigmoid(torch.tanh(G(y1))) * 3


def through_a_letter(x1, x2, F):
    s = exp(-tanh(F(x2)))
    return (x1 + s) * s, x2


def shared_sum(x1, x2):
    u = x1 + x2
    return u + 3 * x2, u - x1


def negated_difference(x1, x2):
    return x1 / 2 + -x2, 1 + x1 + x2


class Leapfrog:
    def __call__(self, x1, x2, F):
        return leapfrog(x1, x2, F)


# ------------------------------------------------------------------------ what is derived, and its proof

DERIVED = {
    additive: ("x2 = y2 − G(y1)", "x1 = y1 − F(x2)", "1"),
    swapped: ("x1 = y2 − F(y1)", "x2 = y1 − G(x1)", "(−1)^n"),
    single: ("x1 = y2", "x2 = y1 − G(x1)", "(−1)^n"),
    half: ("x2 = y2", "x1 = y1 − F(x2)", "1"),
    affine: (
        "s′, t′ = G(y1)",
        "x2 = (y2 − t′) / exp(tanh(s′))",
        "s, t = F(x2)",
        "x1 = (y1 − t) / exp(tanh(s))",
        "exp(Σ tanh(s) + Σ tanh(s′))",
    ),
    damped: ("x2 = (y2 − G(y1)) / γ", "x1 = (y1 − F(x2)) / γ", "γ^2n"),
    leapfrog: ("x2 = y1", "x1 = y2 − 2·F(x2)", "(−1)^n"),
    momentum: ("x = y1 − y2", "v = (y2 − (1 − γ)·f(x)) / γ", "γ^n"),
    sums_and_differences: ("x2 = (y2 − y1) / (−2)", "x1 = y1 − x2", "(−2)^n"),
    round_robin: ("x3 = y2", "x2 = y1 − G(x3, y3)", "x1 = y3 − F(x2, x3)", "1"),
    squashed: (
        "x2 = 1 − (y2 + sigmoid(tanh(G(y1)))·3) / (−0.5)",
        "scale = 2 + tanh(F(x2))",
        "x1 = (y1 − scale)·scale",
        "(−1)^n · (−0.5)^n · Π 1 / scale",
    ),
}


@pytest.mark.parametrize("formula", DERIVED, ids=lambda formula: formula.__name__)
def test_the_inverse_and_the_determinant_are_derived(formula):
    report = check(formula)
    *inverse, determinant = DERIVED[formula]
    assert str(report.coupling.inverse).splitlines() == inverse
    assert report.coupling.determinant.text == determinant
    assert report.round_trip < 1e-12
    assert report.log_det == pytest.approx(report.numeric_log_det, abs=1e-12)
    assert report.sign == report.numeric_sign
    assert report.sound


@pytest.mark.parametrize(
    "formula",
    [
        rotation,
        through_a_letter,
        shared_sum,
        negated_difference,
        Leapfrog(),
        partial(damped, gamma=0.25),
        lambda a, b, F: (-a - F(b), b),
    ],
)
def test_other_ways_to_write_a_coupling_are_sound(formula):
    assert check(formula).sound


def test_formulas_print_with_the_parentheses_they_need():
    def tangled(a, b, F, gamma=3):
        c = -(a + -b) - (b - F(-a * b)) * 2
        return c - (-F(c)), b / gamma / (gamma * -2)

    assert str(record(tangled)).splitlines() == [
        "c = −(a + (−b)) − (b − F((−a)·b))·2",
        "y1 = c − (−F(c))",
        "y2 = b / γ / (γ·(−2))",
    ]


def test_constants_keep_their_letters_in_the_determinant():
    assert (
        derive(lambda x1, x2, F, beta=3: (x1 / beta + F(x2), x2 * beta)).determinant.text == "(1 / β)^n · β^n"
    )
    assert derive(partial(damped, gamma=-0.5)).determinant.text == "γ^2n"
    assert derive(lambda x1, x2, F, step=2: (x1 * (1 - step) + F(x2), x2 / step)).determinant.text == (
        "(−1)^n · (1 / step)^n"
    )


def test_a_partial_formula_has_the_name_of_its_function():
    assert derive(partial(damped, gamma=0.25)).name == "damped"


def test_what_the_outputs_do_not_need_is_left_out():
    def with_a_detour(x1, x2, F):
        torch.relu(F(x1))
        return x1 + F(x2), x2

    assert str(derive(with_a_detour).forward) == str(derive(half).forward)


def test_a_report_prints_the_coupling_and_the_confirmation():
    assert str(check(damped)).splitlines()[:5] == [
        "damped    y1 = γ·x1 + F(x2)",
        "          y2 = γ·x2 + G(y1)",
        "inverse   x2 = (y2 − G(y1)) / γ",
        "          x1 = (y1 − F(x2)) / γ",
        "det J     γ^2n",
    ]
    assert str(check(damped)).splitlines()[5].startswith("confirmed by numbers: round trip ")


@pytest.mark.parametrize("wrong", [{"round_trip": 1e-3}, {"log_det": 1.0}, {"sign": 1}], ids=str)
def test_a_report_with_wrong_numbers_is_not_sound(wrong):
    report = dataclasses.replace(check(single), **wrong)
    assert not report.sound
    assert "NOT CONFIRMED" in str(report)


def test_check_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check(affine)
    assert torch.equal(torch.rand(4), expected)


def test_the_examples_in_the_docstrings_run():
    failures, examples = doctest.testmod(couplings, optionflags=doctest.ELLIPSIS)
    assert examples > 5
    assert failures == 0


# ------------------------------------------------------------------------------- formulas drawn at random


def reversible_formula(seed):
    """Eight random moves, each of which can be undone, on two or three streams."""
    draw = random.Random(seed)
    streams = draw.choice((2, 3))
    kinds = ["add", "scale", "divide", "negate", "halve", "mix", "swap"]
    moves = [(draw.choice(kinds), *draw.sample(range(streams), 2)) for _ in range(8)]

    def formula(*arguments):
        *z, F, G = arguments
        for move, i, j in moves:
            match move:
                case "add":
                    z[i] = z[i] + F(z[j])
                case "scale":
                    z[i] = z[i] * exp(tanh(G(z[j])))
                case "divide":
                    z[i] = z[i] / (1.5 - torch.sigmoid(tanh(G(z[j]))))
                case "negate":
                    z[i] = G(z[j]) - z[i]
                case "halve":
                    z[i] = -0.5 * z[i] + 1
                case "mix":
                    z[i], z[j] = z[i] + z[j], z[i] - 2 * z[j]
                case "swap":
                    z[i], z[j] = z[j], z[i]
        return tuple(z)

    two, three = (lambda a, b, F, G: formula(a, b, F, G)), (lambda a, b, c, F, G: formula(a, b, c, F, G))
    return two if streams == 2 else three


@pytest.mark.parametrize("seed", range(60))
def test_random_reversible_formulas_are_solved_soundly(seed):
    report = check(reversible_formula(seed))
    assert report.sound, str(report)


def any_formula(seed):
    """A few random operations, most of which cannot be undone."""
    draw = random.Random(seed)
    moves = [(draw.choice("+-*/nFs"), draw.random(), draw.random()) for _ in range(draw.randint(1, 5))]
    ends = draw.random(), draw.random()

    def formula(x1, x2, F):
        pool = [x1, x2]
        for move, i, j in moves:
            a, b = pool[int(i * len(pool))], pool[int(j * len(pool))]
            match move:
                case "+":
                    pool.append(a + b)
                case "-":
                    pool.append(a - 2 * b)
                case "*":
                    pool.append(a * b)
                case "/":
                    pool.append(a / (2 + tanh(b)))
                case "n":
                    pool.append(1 - a)
                case "F":
                    pool.append(F(a))
                case "s":
                    pool.append(a * exp(tanh(b)))
        return tuple(pool[-1 - int(end * 3) % len(pool)] for end in ends)

    return formula


def test_a_random_formula_is_refused_or_solved_soundly():
    refused, sound = 0, []
    for seed in range(600):
        try:
            sound.append(check(any_formula(seed)).sound)
        except RefusalError:
            refused += 1
    assert refused > 100
    assert len(sound) > 50
    assert all(sound)


# ------------------------------------------------------------------------------------------------ refusals


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
def test_a_formula_without_inverse_is_refused_with_the_reason(reason):
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
def test_what_is_no_formula_is_refused_with_its_line(reason):
    formula, line = NOT_A_FORMULA[reason]
    with pytest.raises(RefusalError) as refusal:
        derive(formula)
    where = (
        f"Coupling {formula.__name__} (test_couplings.py, line {formula.__code__.co_firstlineno + line}): "
    )
    assert str(refusal.value).startswith(where + reason)


def test_streams_that_never_cross_are_reported_as_useless():
    apart = check(lambda x1, x2: (x2 * 2, -x1))
    assert apart.sound
    assert apart.coupling.remarks == (
        "invertible but useless: the streams never cross, since each output depends on one of them only",
    )
    assert derive(half).remarks == ("y2 is x2 unchanged: let a coupling follow that changes it",)
    assert str(derive(half)).endswith("\nremark    y2 is x2 unchanged: let a coupling follow that changes it")
    assert all(not derive(formula).remarks for formula in (additive, swapped, single, affine, damped))


# ------------------------------------------------------------------------ what a runtime does with a coupling


class Net(nn.Module):
    """A small network of one or two streams, with one or two results, that counts its calls."""

    def __init__(self, results, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(results, 5, 5, dtype=torch.float64, generator=generator) / 3
        self.weights = nn.ParameterList(weights.unbind())
        self.calls = 0

    def forward(self, *streams):
        self.calls += 1
        mixed = sum(place * tanh(stream) for place, stream in enumerate(streams, 1))
        given = tuple(mixed @ weight for weight in self.weights)
        return given if len(given) > 1 else given[0]


def reconstruct(coupling, outputs, branches):
    """Every value of the formula, without a gradient; and each branch call, with the graph that it left."""
    values, calls = dict(zip(coupling.inverse.inputs, outputs, strict=True)), {}
    for step in coupling.inverse.instructions:
        if isinstance(step, Call):
            leaves = {name: values[name].detach().requires_grad_() for name in names(step.operands)}
            with torch.enable_grad():
                calls[step] = leaves, step.execute(leaves, branches)
            values |= zip(step.results, (given.detach() for given in calls[step][1]), strict=True)
        else:
            (values[step.result],) = step.execute(values, {})
    return values, calls


def backward(coupling, outputs, gradients, branches):
    """The gradients of the streams; those of the branches' parameters are accumulated."""
    values, calls = reconstruct(coupling, outputs, branches)
    due = Counter(dict(zip(coupling.forward.outputs, gradients, strict=True)))
    for step in reversed(coupling.forward.instructions):
        if isinstance(step, Call):
            leaves, given = calls[step]
        else:
            leaves = {name: values[name].detach().requires_grad_() for name in names(step.operands)}
            given = step.execute(leaves, {})
        torch.autograd.backward(given, [due.pop(name) for name in step.results])
        for name, leaf in leaves.items():
            due[name] = due[name] + leaf.grad
    return [due[name] for name in coupling.forward.inputs]


@pytest.mark.parametrize("formula", DERIVED, ids=lambda formula: formula.__name__)
def test_a_runtime_gets_the_gradients_with_one_call_of_each_branch(formula):
    coupling = derive(formula)
    branches = {name: Net(count, seed) for seed, (name, count) in enumerate(coupling.forward.gives.items())}
    parameters = [weight for net in branches.values() for weight in net.parameters()]
    generator = torch.Generator().manual_seed(9)
    count = len(coupling.forward.inputs)
    streams = torch.randn(count, 4, 5, dtype=torch.float64, generator=generator).requires_grad_().unbind()
    gradients = torch.randn(count, 4, 5, dtype=torch.float64, generator=generator).unbind()
    outputs = formula(*streams, *branches.values())
    expected = torch.autograd.grad(outputs, [*streams, *parameters], gradients)
    calls = {name: net.calls for name, net in branches.items()}

    found = backward(coupling, [y.detach() for y in outputs], gradients, branches)

    assert {name: net.calls - calls[name] for name, net in branches.items()} == calls
    for got, want in zip([*found, *(weight.grad for weight in parameters)], expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def run_on_grid(program, streams, branches, bits, residues):
    """Run in multiples of 2^-12; a product that contracts leaves a residue, which the inverse takes up."""
    values = dict(zip(program.inputs, streams, strict=True))
    for step in program.instructions:
        results = step.execute(values, branches)
        if isinstance(step, Call):
            results = tuple((result * 4096).round() / 4096 for result in results)
        elif step.undoes in bits:
            results = (results[0] + residues[step.undoes],)
        elif step.result in bits and step.undoes is None:
            factor = 2.0 ** -bits[step.result]
            whole = (results[0] * 4096).floor() / 4096
            residues[step.result] = (results[0] - whole) / factor
            results = (whole,)
        values |= zip(step.results, results, strict=True)
    return [values[name] for name in program.outputs]


@pytest.mark.parametrize("formula", [additive, swapped, single, half, damped, partial(damped, gamma=0.125)])
def test_exact_couplings_come_back_bit_for_bit_on_the_grid(formula):
    coupling = derive(formula)
    bits = coupling.determinant.residue_bits
    names = coupling.forward.branches
    layers = [{name: Net(1, 7 * layer + place) for place, name in enumerate(names)} for layer in range(20)]
    generator = torch.Generator().manual_seed(1)
    start = list((torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 4096).round() / 4096)
    streams, kept = start, []
    for branches in layers:
        kept.append({})
        streams = run_on_grid(coupling.forward, streams, branches, bits, kept[-1])
    lossy = streams
    for branches, residues in zip(reversed(layers), reversed(kept), strict=True):
        streams = run_on_grid(coupling.inverse, streams, branches, bits, residues)
        lossy = run_on_grid(coupling.inverse, lossy, branches, bits, Counter())
    assert coupling.determinant.exact
    assert all(map(torch.equal, streams, start))
    assert all(map(torch.equal, lossy, start)) == (not bits)


def test_the_determinant_says_what_an_inverse_needs():
    def needs(formula):
        determinant = derive(formula).determinant
        return determinant.exact, sum(determinant.residue_bits.values()), determinant.amplification

    assert needs(additive) == (True, 0, 1)
    assert needs(damped) == (True, 2, 2)
    assert needs(partial(damped, gamma=1 / 8)) == (True, 6, 8)
    assert needs(lambda x1, x2, F: (F(x2) - x1 / 4, 2 * x2)) == (True, 2, 4)
    assert needs(momentum) == (False, 0, pytest.approx(1 / 0.9))
    assert needs(affine) == (False, 0, pytest.approx(math.e))
    assert needs(squashed) == (False, 1, pytest.approx(3))


def test_the_log_determinant_is_the_same_on_both_ways_and_counts_what_is_broadcast():
    coupling = derive(lambda x1, x2, F: (x1 * exp(tanh(F(x2))), 0.5 * x2))
    F = lambda x: x.mean(1, keepdim=True)  # noqa: E731
    x1, x2 = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    forward = coupling.forward.run(x1, x2, F)
    inverse = coupling.inverse.run(forward["y1"], forward["y2"], F)
    expected = 3 * tanh(F(x2)).sum() + 24 * math.log(0.5)
    assert torch.allclose(coupling.determinant.log(forward), expected)
    assert torch.allclose(coupling.determinant.log(inverse), expected)


def test_inverse_instructions_undo_or_repeat_those_of_the_formula_under_the_same_names():
    coupling = derive(damped)
    forward = {step.results: step for step in coupling.forward.instructions}
    undone = [step.undoes for step in coupling.inverse.instructions if isinstance(step, Apply)]
    assert undone == ["y2", "v3", "y1", "v1"]
    assert all(forward[(name,)].op in (Op.ADD, Op.MULTIPLY) for name in undone)
    calls = [step for step in coupling.inverse.instructions if isinstance(step, Call)]
    assert [step.branch for step in calls] == ["G", "F"]
    assert all(step == forward[step.results] for step in calls)


def test_a_branch_whose_result_does_not_fit_is_an_error():
    x = torch.zeros(2, 3)
    with pytest.raises(
        RevifyError, match=r"Branch F gave a Tensor where the coupling takes s, t: pass one that"
    ):
        derive(affine).forward(x, x, torch.tanh, torch.tanh)
    with pytest.raises(RevifyError, match=r"Branch F gave a tuple of 2 where the coupling takes v1: pass"):
        derive(additive).forward(x, x, lambda x: (x, x), torch.tanh)
    with pytest.raises(RevifyError, match=r"Got 3 arguments for \(x1, x2, F, G\)"):
        derive(additive).forward(x, x, torch.tanh)


def test_a_coupling_can_be_copied_and_pickled():
    coupling = derive(affine)
    assert copy.deepcopy(coupling) == coupling
    assert pickle.loads(pickle.dumps(coupling)) == coupling


@pytest.mark.parametrize(("shape", "axis"), [((2, 6, 4, 4), 1), ((2, 9, 6), -1), ((2, 4, 4, 6), 3)])
def test_affine_begins_as_additive_and_learns_its_scale(shape, axis):
    F, G = nn.Tanh(), nn.Softsign()
    scaled_F, scaled_G = ScaleShift(F, 6, axis), ScaleShift(G, 6, axis)
    x1, x2 = torch.randn(shape), torch.randn(shape)
    outputs = affine(x1, x2, scaled_F, scaled_G)
    assert all(map(torch.equal, outputs, additive(x1, x2, F, G)))
    sum(y.sum() for y in outputs).backward()
    others = [place for place in range(len(shape)) if place != axis % len(shape)]
    assert torch.allclose(
        scaled_G.weight.grad, (x2 * G(outputs[0])).sum(others).detach(), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        scaled_F.weight.fill_(0.7)
    assert not torch.equal(affine(x1, x2, scaled_F, scaled_G)[0], outputs[0])


# ----------------------------------------------------------------------------------------------- intervals


def test_an_interval_holds_what_the_operation_gives_for_the_numbers_in_it():
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
                corners = [
                    float(op.compute(*(torch.tensor(e, dtype=torch.float64) for e in at))) for at in ends
                ]
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
def test_only_a_range_without_zero_and_overflow_is_invertible(bounds, invertible):
    assert bounds.invertible == invertible
