"""revify: turn an existing PyTorch model into a reversible one, and train it in a fraction of the memory."""

from __future__ import annotations

from revify import couplings, presets
from revify.calibration import calibrate
from revify.checkpoints import load, save
from revify.conversion import convert, plan, revert
from revify.errors import (
    CheckpointError,
    GridRangeError,
    RefusalError,
    ReplayError,
    RevifyError,
    StreamError,
)
from revify.measuring import measure
from revify.plans import Plan
from revify.reversible import Reversible, ReversibleSequence
from revify.runtime import plain_backward

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "GridRangeError",
    "Plan",
    "RefusalError",
    "ReplayError",
    "Reversible",
    "ReversibleSequence",
    "RevifyError",
    "StreamError",
    "calibrate",
    "convert",
    "couplings",
    "load",
    "measure",
    "plain_backward",
    "plan",
    "presets",
    "revert",
    "save",
]
