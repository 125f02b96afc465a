"""revify: turn an existing PyTorch model into a reversible one, and train it in a fraction of the memory.

What is public is what `__all__` lists here and in the packages' faces. Nothing below is imported before it is used, so that
`import revify` costs nothing and `revify --help` comes at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from revify._version import __version__
from revify.errors import (
    CheckpointError,
    GridRangeError,
    RefusalError,
    ReplayError,
    RevifyError,
    StreamError,
)

if TYPE_CHECKING:
    from revify import couplings, presets
    from revify.calibration.calibrating import calibrate
    from revify.conversion import convert, disable, enable, plan, revert
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
    "disable",
    "enable",
    "is_invertible",
    "load",
    "measure",
    "plain_backward",
    "plan",
    "presets",
    "revert",
    "save",
]

_HOMES = {
    "Invertible": "invertible",
    "Method": "methods",
    "Plan": "plans",
    "Reversible": "reversible",
    "ReversibleSequence": "reversible",
    "calibrate": "calibration.calibrating",
    "convert": "conversion",
    "disable": "conversion",
    "enable": "conversion",
    "is_invertible": "invertible",
    "load": "saving",
    "measure": "measuring.measuring",
    "plain_backward": "runtime.tape",
    "plan": "conversion",
    "revert": "conversion",
    "save": "saving",
}
_PACKAGES = ("couplings", "presets")


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"revify.{name}")
    if name in _HOMES:
        return getattr(import_module(f"revify.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'revify' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
