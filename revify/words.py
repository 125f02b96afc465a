"""The words that methods, plans and files use, and their ranges; importing them costs nothing."""

from __future__ import annotations

from typing import Literal

FIXED = ("identity", "midpoint", "zero", "output")
CALIBRATED = ("diagonal", "lowrank", "linear_z", "linear")
STEPS = ("coded", "recurrence")
MODES = ("keep", "recompute")  # of a block of a stage that is none of its steps
SIGNS = ("positive", "balanced", "random")
BALANCED = "-++-"  # balanced signs of new plans, over the coupled steps of each stage
FORMERLY_BALANCED = "+--+"  # those of plans that do not say
MAX_BITS = 8  # the residue of one element fits one byte while it is being packed
DEFAULT_GRID = 12  # ±4096 in float32
SHORT_GRID = 20  # the finest of which float32 still holds a useful range, ±16
WIDE_GRID = 32  # ±2^21 in float64
MAX_GRID = 40  # ±2^13 in float64

PredictorName = Literal[
    "identity", "midpoint", "zero", "output", "diagonal", "lowrank", "linear_z", "linear", "auto"
]  # FIXED, CALIBRATED and, for the richest that is cheap enough, "auto"
SignName = Literal["positive", "balanced", "random"]
Unit = Literal["block", "branch"]
Transitions = Literal["keep", "checkpoint"]
Guard = Literal["bits", "shapes"]
Streams = Literal["full", "split"]
StepName = Literal["coded", "recurrence"]
