"""What makes a backward trustworthy: the range in which the grid is exact, and whether a second run gave the same bits.

Both are looked at late and all at once, since reading a number from a device makes it wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Variable

from revify.errors import GridRangeError, ReplayError
from revify.runtime.catching import LIKELY_CAUSES
from revify.runtime.grid import Grid
from revify.words import WIDE_GRID

FEWEST_POINTS = 16  # that the largest value of a stream must be away from zero
MAX_DRIFT = 1e-3  # of a reconstructed stream, relative; gradients are then off by about as much


class Peaks:
    """How far the values of one forward pass went out on the grid, where a backward may follow.

    Values that are not finite flow on as in the plain model, and make its gradients what they are there: not finite.

    Args:
        grid: of the stream.

    Attributes:
        finite: whether all values looked at so far were; where they were not, nothing is reconstructed that could be
            compared with what it was (inf − inf is nan).
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.finite = True
        self._peaks: list[tuple[str, Tensor]] = []
        self._entries: list[tuple[str, Tensor]] = []

    def enter(self, name: str, x: Tensor) -> None:
        """Note what comes to the block of this name, before it is rounded to the grid."""
        if x.numel():
            self._entries.append((name, torch.stack(torch.aminmax(x.detach())).abs().amax()))

    def observe(self, name: str, *values: Tensor) -> None:
        """Note the extremes of values that the step of this name gave."""
        self._peaks += [(name, torch.stack(torch.aminmax(v.detach()))) for v in values if v.numel()]

    def check(self) -> None:
        """Refuse finite values outside of the range where the grid is exact, and streams that it would round away."""
        self._check_entries()
        if not self._peaks:
            return
        peaks = torch.stack([extremes for _, extremes in self._peaks]).abs().amax(dim=1)
        names = [name for name, _ in self._peaks]
        self._peaks = []
        limit = self.grid.limit(peaks.dtype)
        inside = peaks < limit
        if bool(inside.all()):
            return
        self.finite = self.finite and bool(peaks.isfinite().all())
        outside = ~inside & peaks.isfinite()
        if not bool(outside.any()):
            return
        where = int(outside.nonzero()[0])
        peak = float(peaks[where])
        raise GridRangeError(
            f"{names[where]}: a stream value of magnitude {peak:.6g} is outside of the exact range ±{limit:g} of "
            f"the grid with resolution 2^-{self.grid.resolution}, so its input could not be reconstructed. Convert "
            f"with a coarser grid, for example grid={self._fitting_resolution(peak, limit)}, or with grid={WIDE_GRID}, "
            "which is held in float64."
        )

    def _check_entries(self) -> None:
        entries, self._entries = self._entries, []
        for name, peak in ((name, float(peak)) for name, peak in entries):
            if 0 < peak * self.grid.scale < FEWEST_POINTS:
                raise GridRangeError(
                    f"{name}: the largest value that enters the stream is {peak:.3g}, less than {FEWEST_POINTS} points of the "
                    f"grid with resolution 2^-{self.grid.resolution}, which would round the stream away. Convert with a "
                    f"finer grid: grid={WIDE_GRID}, which is held in float64, shows every change that float32 shows."
                )

    def _fitting_resolution(self, peak: float, limit: float) -> int:
        resolution = self.grid.resolution
        while limit < 4 * peak:
            resolution, limit = resolution - 1, limit * 2
        return resolution


class Repeats:
    """For each second run of a block, whether it gave other values than the first."""

    def __init__(self) -> None:
        self._repeats: list[tuple[str, Tensor]] = []

    def note(self, name: str, returned: Tensor | None, *saved: Tensor) -> None:
        """Note what a second run of this name did: truth values, possibly still being computed.

        Args:
            name: of the block.
            returned: whether it returned other values, None where it returned nothing.
            saved: whether autograd saved other values.
        """
        if returned is not None:
            self._repeats.append((f"{name} returned other values", returned))
        self._repeats += [(f"{name} had other values saved for its backward", differs) for differs in saved]

    def check_in_the_end(self) -> None:
        """Refuse the gradients of the running backward, at its end, if anything did not repeat itself."""
        in_the_end(partial(_check_repeats, self._repeats))  # without the tape, which is to be freed


class Drifts:
    """How far streams that were reconstructed in floats are from what they were."""

    def __init__(self) -> None:
        self._drifts: list[tuple[str, Tensor]] = []

    def note(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Compare a sample of a stream with what it was."""
        self._drifts.append((name, (found - expected).norm() / expected.norm().clamp_min(1e-30)))

    def check_in_the_end(self) -> None:
        """Refuse the gradients of the running backward, at its end, if the drift spoils them."""
        in_the_end(partial(_check_drifts, self._drifts))


def in_the_end(check: Callable[[], None]) -> None:
    """Call it when the running backward ends: calling it now would make the device wait at every block."""
    if torch._C._current_graph_task_id() >= 0:
        Variable._execution_engine.queue_callback(check)
    else:
        check()


def _check_repeats(repeats: list[tuple[str, Tensor]]) -> None:
    """Refuse gradients from blocks that did not repeat themselves; `repeats` is empty afterwards."""
    if not repeats:
        return
    device = repeats[0][1].device
    different = torch.stack([differs.to(device) for _, differs in repeats]).tolist()
    found = [what for what, _ in repeats]
    repeats.clear()
    if any(different):
        raise ReplayError(
            f"{found[different.index(True)]} when it was run again in backward, so the "
            f"gradients just computed are wrong: discard them. {LIKELY_CAUSES}"
        )


def _check_drifts(drifts: list[tuple[str, Tensor]]) -> None:
    """Refuse gradients from streams that drifted too far; `drifts` is empty afterwards."""
    if not drifts:
        return
    found = torch.stack([drift for _, drift in drifts])
    names = [name for name, _ in drifts]
    drifts.clear()
    outside = ~(found <= MAX_DRIFT)
    if bool(outside.any()):
        where = int(outside.nonzero()[0])
        raise ReplayError(
            f"{names[where]}: its input as reconstructed in backward is off by {float(found[where]):.1e} of its size, "
            f"more than {MAX_DRIFT:g}, so the gradients just computed are not to be trusted: discard them. Either the "
            "inverse of the coupling magnifies rounding errors too much: use fewer blocks, float64, or a coupling that "
            f"is exact on the grid. Or a branch did not repeat itself. {LIKELY_CAUSES}"
        )
