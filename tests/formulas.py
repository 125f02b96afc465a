"""Formulas of couplings, named after their difficulty, and formulas drawn at random."""

from __future__ import annotations

import random

import torch
from torch import exp, tanh

from revify.couplings import additive, affine, damped, half, single, swapped


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


# the inverse and the determinant, as they must print
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
