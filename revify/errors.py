"""What can go wrong, as exceptions: one root, and a child only where a caller would act differently."""

from __future__ import annotations


class RevifyError(Exception):
    """Root of every error that revify raises on purpose; its text says where, what, why and what to do."""


class RefusalError(RevifyError):
    """The model, as it is, is not converted: nothing was changed."""


class StreamError(RevifyError):
    """A converted model was run in a way that its stream of values does not allow."""


class GridRangeError(StreamError, ArithmeticError):
    """A finite stream value left the range in which the grid is exact, where a backward was to follow."""


class ReplayError(StreamError):
    """A block gave other values when it was run again, so its gradients would have been wrong."""


class CheckpointError(RevifyError):
    """A file is not a revify checkpoint that this version can read, or does not fit the model."""
