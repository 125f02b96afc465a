"""The fastest way within a budget: against all ways of small instances, and in no time for large ones."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from revify.planning.fastest import Piece, Ways, peak_of


def some_pieces(seed: int, places: int = 6, *, largest: int = 40) -> list[Piece]:
    """From each place one piece to the next, and some that are alternatives or longer."""
    chance = random.Random(seed)
    found = []
    for start in range(places):
        for _ in range(chance.choice((1, 2, 3))):
            end = (
                start + 1 if not found or found[-1].start != start else min(places, start + chance.choice((1, 1, 2, 3)))
            )
            held = chance.randrange(largest)
            found.append(Piece(start, end, held, held + chance.randrange(largest), chance.choice((1.0, 2.0, 3.5, 7.0))))
    return found


def all_ways(pieces: list[Piece], last: int, start: int = 0) -> Iterator[tuple[Piece, ...]]:
    if start == last:
        yield ()
        return
    for piece in pieces:
        if piece.start == start:
            yield from ((piece, *rest) for rest in all_ways(pieces, last, piece.end))


def time_of(way: tuple[Piece, ...] | None) -> float:
    return float("inf") if way is None else sum(piece.time for piece in way)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_way_that_fits_is_faster(seed: int) -> None:
    pieces = some_pieces(seed)
    ways = Ways(pieces, 6)
    everything = list(all_ways(pieces, 6))
    least = min(map(peak_of, everything))
    assert ways.least() == least
    assert ways.fastest(least - 1) is None
    for budget in range(least, max(map(peak_of, everything)) + 2, 3):
        found = ways.fastest(budget)
        assert found is not None
        assert peak_of(found) <= budget
        assert time_of(found) == min(time_of(way) for way in everything if peak_of(way) <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_way_in_that_time_needs_less(seed: int) -> None:
    pieces = some_pieces(seed)
    everything = list(all_ways(pieces, 6))
    quickest = min(map(time_of, everything))
    for limit in (quickest, 1.2 * quickest, 2 * quickest, 100.0):
        found = Ways(pieces, 6).smallest(limit)
        assert found is not None
        assert time_of(found) <= limit
        assert peak_of(found) == min(peak_of(way) for way in everything if time_of(way) <= limit)
    assert Ways(pieces, 6).smallest(quickest - 0.5) is None


@pytest.mark.parametrize("seed", range(4))
def test_large_numbers_are_rounded_up_and_never_over_the_budget(seed: int) -> None:
    pieces = some_pieces(seed, 60, largest=10**9)
    ways = Ways(pieces, 60)
    least, before = ways.least(), float("inf")
    for budget in range(least, 4 * least, least // 5):
        found = ways.fastest(budget)
        assert found is not None
        assert peak_of(found) <= budget
        assert time_of(found) <= before  # more budget is never slower
        before = time_of(found)


def test_two_hundred_units_take_no_time() -> None:
    pieces = []
    chance = random.Random(0)
    for unit in range(200):
        size = chance.randrange(10**6, 10**8)
        pieces += [
            Piece(unit, unit + 1, size, size, chance.uniform(1, 2)),
            Piece(unit, unit + 1, size // 9, size, chance.uniform(2, 3)),
            Piece(unit, unit + 1, size // 40, size, chance.uniform(3, 4)),
        ]
    ways = Ways(pieces, 200)
    start = time.process_time()
    found = ways.fastest(ways.least() * 5)
    assert found is not None
    assert len(found) == 200
    assert time.process_time() - start < 2
