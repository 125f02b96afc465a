"""revify: turn an existing PyTorch model into a reversible one, and train it in a fraction of the memory."""

from __future__ import annotations

from revify import couplings, presets
from revify._version import __version__
from revify.calibration.calibrating import calibrate
from revify.conversion import convert, plan, revert
from revify.errors import (
    CheckpointError,
    GridRangeError,
    RefusalError,
    ReplayError,
    RevifyError,
    StreamError,
)
from revify.invertible import Invertible, is_invertible
from revify.measuring.measuring import measure
from revify.methods import Method
from revify.plans import Plan
from revify.reversible import Reversible, ReversibleSequence
from revify.runtime.tape import plain_backward
from revify.saving import load, save

__all__ = [
    "CheckpointError",
    "GridRangeError",
    "Invertible",
    "Method",
    "Plan",
    "RefusalError",
    "ReplayError",
    "Reversible",
    "ReversibleSequence",
    "RevifyError",
    "StreamError",
    "__version__",
    "calibrate",
    "convert",
    "couplings",
    "is_invertible",
    "load",
    "measure",
    "plain_backward",
    "plan",
    "presets",
    "revert",
    "save",
]
