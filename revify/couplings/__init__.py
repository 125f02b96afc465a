"""Couplings: how two streams update each other so that it can be undone, written forward only.

A coupling is a plain function of streams x1, x2 and branches F, G. Its inverse and log |det J| are written
nowhere: `derive` solves the formula for its inputs, and `check` confirms the result with numbers. A coupling
of your own is a function like those below; there is nothing to register.

    >>> def leapfrog(x1, x2, F):
    ...     return x2, x1 + 2 * F(x2)
    >>> print(derive(leapfrog))
    leapfrog   y2 = x1 + 2·F(x2)
               y1 = x2
    inverse    x2 = y1
               x1 = y2 − 2·F(x2)
    det J      (−1)^n

How it is done, file by file:

    shipped       the couplings of the literature
    deriving      a formula               → its inverse, determinant and remarks
    formulas      a Python function       → a program
    solving       a program               → its inverse and pivots (elimination), or why not (explaining)
    determinants  the pivots              → det J
    programs      what all of them speak
    intervals     where the values of a program can lie
    guarding      a factor that only a run can tell from 0
    parts         a coupling              → couplings with one branch each

Pure functions of frozen records; the only tensors are those a program is run on.
"""

from __future__ import annotations

from revify.couplings.deriving import Coupling, Report, check, derive
from revify.couplings.guarding import guarded
from revify.couplings.shipped import (
    Branch,
    EvenOdd,
    PairBranch,
    ScaleShift,
    Streams,
    additive,
    affine,
    damped,
    exponential,
    glow,
    half,
    single,
    swapped,
)

__all__ = [
    "Branch",
    "Coupling",
    "EvenOdd",
    "PairBranch",
    "Report",
    "ScaleShift",
    "Streams",
    "additive",
    "affine",
    "check",
    "damped",
    "derive",
    "exponential",
    "glow",
    "guarded",
    "half",
    "single",
    "swapped",
]
