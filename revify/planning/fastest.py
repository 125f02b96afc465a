"""Ways through a model, each made of pieces that hold and take something → the fastest that fits into a budget.

    place 0 ──▶ 1 ──▶ 2 ──▶ … ──▶ n        a way takes one piece after the other, in forward order
            ╲────────▶╱                    pieces may be alternatives of any length

Backward frees from the end: when a piece is at work, what all pieces before it hold is still there, and nothing of those
after it. So the peak of a way is the most that any of its pieces needs on top of what is held before that piece, and a
dynamic programme over the places is exact: of two ways to a place, one that holds more and takes longer is given up. What is
held is counted in steps of a fixed size, rounded up, so that no way is over its budget and more budget is never slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

LEVELS = 4096  # steps in which held bytes are counted
FEW_LEVELS = 512  # the same, where many budgets are only looked at


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a way.

    Args:
        start: the place where it begins.
        end: the place where it ends, a higher number.
        held: bytes that it holds from its forward to its backward.
        peak: the most bytes that it needs at a time, beside what is held before it; no less than `held`.
        time: that it takes.
    """

    start: int
    end: int
    held: int
    peak: int
    time: float


def peak_of(way: Iterable[Piece]) -> int:
    """The most bytes that a way needs at a time."""
    held = peak = 0
    for piece in way:
        peak = max(peak, held + piece.peak)
        held += piece.held
    return peak


P = TypeVar("P", bound=Piece)
_Labels = dict[int, tuple[float, int]]  # the ways to a place: held → what it costs, and the number of the way


class Ways(Generic[P]):
    """All ways from place 0 to the last place.

    Args:
        pieces: between places.
        last: the place where the ways end.
        levels: steps in which held bytes are counted; the time to find a way grows with them.
    """

    def __init__(self, pieces: Iterable[P], last: int, levels: int = LEVELS) -> None:
        self._last, self._levels = last, levels
        self._from: dict[int, list[P]] = defaultdict(list)
        for piece in sorted(pieces, key=lambda piece: (piece.start, piece.end, piece.held, piece.peak, piece.time)):
            others = self._from[piece.start]
            if not any(
                o.end == piece.end and o.held <= piece.held and o.peak <= piece.peak and o.time <= piece.time
                for o in others
            ):
                others.append(piece)
        self._places = sorted(self._from)
        self._step = max(1, self._most() // levels)

    def fastest(self, budget: int) -> tuple[P, ...] | None:
        """The way that takes least time of those that need no more than the budget; None where none does."""
        taken: list[tuple[P | None, int]] = [
            (None, -1)
        ]  # the last piece of each way that was followed, and the way before
        waiting: dict[int, _Labels] = defaultdict(dict, {0: {0: (0.0, 0)}})
        room = budget // self._step
        for place in self._places:
            front = _undominated(waiting.pop(place, {}))
            for piece in self._from[place]:
                more, most, reached = self._steps(piece.held), room - self._steps(piece.peak), waiting[piece.end]
                for held, (time, number) in front:
                    if held > most:
                        break
                    known = reached.get(held + more)
                    if known is None or time + piece.time < known[0]:
                        reached[held + more] = (time + piece.time, len(taken))
                        taken.append((piece, number))
        front = _undominated(waiting[self._last])
        return _followed(taken, front[-1][1][1]) if front else None

    def least(self) -> int:
        """The smallest budget into which any way fits."""
        waiting: dict[int, _Labels] = defaultdict(dict, {0: {0: (0.0, 0)}})
        for place in self._places:
            for held, (most, _) in _undominated(waiting.pop(place, {})):
                for piece in self._from[place]:
                    needed = max(most, held + self._steps(piece.peak))
                    after = held + self._steps(piece.held)
                    if needed < waiting[piece.end].get(after, (float("inf"), 0))[0]:
                        waiting[piece.end][after] = (needed, 0)
        return self._step * int(min(most for most, _ in waiting[self._last].values()))

    def smallest(self, time: float) -> tuple[P, ...] | None:
        """The way that needs least of those that take no more than this time; None where all take more."""
        low, high = self.least() // self._step, self._most_needed()
        best = self._within(high, time)
        while best is not None and low < high:
            middle = (low + high) // 2
            found = self._within(middle, time)
            if found is None:
                low = middle + 1
            else:
                best, high = found, middle
        return best

    def _within(self, room: int, time: float) -> tuple[P, ...] | None:
        found = self.fastest(room * self._step)
        return found if found is not None and sum(piece.time for piece in found) <= time else None

    def _steps(self, size: int) -> int:
        return -(-size // self._step)

    def _most(self) -> int:
        """The most that a way holds in the end."""
        most = dict.fromkeys((0, self._last), 0)
        for place in self._places:
            for piece in self._from[place]:
                most[piece.end] = max(most.get(piece.end, 0), most.get(place, 0) + piece.held)
        return most[self._last]

    def _most_needed(self) -> int:
        """Steps into which every way fits."""
        pieces = [piece for found in self._from.values() for piece in found]
        return self._levels + 1 + len(self._places) + self._steps(max((piece.peak for piece in pieces), default=0))


def _undominated(labels: _Labels) -> list[tuple[int, tuple[float, int]]]:
    """Those of which no other holds as little at no more cost, by what they hold: the last has the lowest cost."""
    kept: list[tuple[int, tuple[float, int]]] = []
    for held in sorted(labels):
        if not kept or labels[held][0] < kept[-1][1][0]:
            kept.append((held, labels[held]))
    return kept


def _followed(taken: Sequence[tuple[P | None, int]], number: int) -> tuple[P, ...]:
    """The pieces of a way, in order."""
    found: list[P] = []
    while number > 0:
        piece, number = taken[number]
        assert piece is not None  # only the way of no pieces ends with none
        found.append(piece)
    return tuple(reversed(found))
