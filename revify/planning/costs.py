"""A timeline of one training step → what any span of its forward pass costs, kept or run again.

held        what autograd (or a checkpoint) holds from the forward of the span to its backward
peak        the most that the span needs at a time beside what is held before it: in its forward, in its second run,
            or in its backward, where the gradients that flow, and those of its parameters, live, too
time        what running it again costs, in the timeline's units of work
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from revify.reading.timeline import Timeline
from revify.runtime.fingerprints import COLUMNS, ROWS

COMPARING = 2 * 4 * ROWS * COLUMNS  # bytes that a checksum takes at most


@dataclass(frozen=True, slots=True)
class Kept:
    """A span that is left to ordinary autograd.

    Args:
        held: bytes of what autograd saves there first.
        peak: the most that it needs.
    """

    held: int
    peak: int


@dataclass(frozen=True, slots=True)
class Again:
    """A span that runs again, without what is held of its inputs.

    Args:
        needed: the places, among the values, of what must be held for it.
        forward: the most that its forward needs, its inputs among that.
        backward: the most that its second run or its backward needs, but for its inputs.
        dropped: bytes that autograd saves and that are dropped.
        time: the work of its second run, which ends at the last tensor that autograd saves.
    """

    needed: tuple[int, ...]
    forward: int
    backward: int
    dropped: int
    time: float


class Costs:
    """What spans of a forward pass cost.

    Args:
        timeline: of a training step.
        bare: of a forward pass without gradients, with the same calls.
    """

    def __init__(self, timeline: Timeline, bare: Timeline) -> None:
        self.timeline = timeline
        self.work = sum(timeline.work)
        self.plain_peak = max(_levels(timeline, 0, timeline.end), default=0)
        self._known: dict[tuple[int, int, tuple[int, int]], Again] = {}
        self._bare = _levels(bare, 0, bare.end)
        self._bare_spans = bare.spans
        self._births = [value.born for value in timeline.values]
        self._saves = sorted((time, place) for place, v in enumerate(timeline.values) for time in v.saved)
        self._gradients = _levels(timeline, timeline.turn, timeline.end)
        self._unsaved = self._not_yet_saved()
        self._first, self._last = self._backward_times()

    def first_saved(self, place: int) -> int:
        """When autograd first saves a value; the end of the forward where it never does."""
        return min(self.timeline.values[place].saved, default=self.timeline.turn)

    def bytes_of(self, places: Iterable[int]) -> int:
        """Of these values."""
        return sum(self.timeline.values[place].bytes for place in places)

    def saved_in(self, start: int, end: int) -> set[int]:
        """The places of the values that autograd saves in a span."""
        return {place for _, place in self._between(start, end)}

    def kept(self, start: int, end: int) -> Kept:
        """A span under ordinary autograd."""
        lasting = {p for p in self._born_in(start, end) if self.timeline.values[p].died >= self.timeline.turn}
        own = {p for p in self.saved_in(start, end) if self.first_saved(p) >= start}
        own |= {p for p in lasting if not self.timeline.values[p].saved}
        held = self.bytes_of(own)
        forward = held + max(self._unsaved[start:end], default=0)
        return Kept(held, max(held, forward, self._backward_peak(start, end, own | lasting)))

    def again(self, start: int, end: int, calls: tuple[int, int], given: Collection[int]) -> Again:
        """A span that runs again.

        Args:
            start: when its first call begins.
            end: when its last call has returned.
            calls: the numbers of its first and its last call.
            given: the places of what it is called with.
        """
        if (start, end, calls) not in self._known:
            self._known[start, end, calls] = self._again(start, end, calls, given)
        return self._known[start, end, calls]

    def _again(self, start: int, end: int, calls: tuple[int, int], given: Collection[int]) -> Again:
        saved = self.saved_in(start, end)
        inner = {
            p for p in self._born_in(start, end) if p in saved or self.timeline.values[p].died >= self.timeline.turn
        }
        needed = set(given) | {p for p in saved if self.timeline.values[p].born < start}
        last, compared = max(self._between(start, end), default=(start - 1, -1))
        last += 1
        first, second = (self._bare_spans[number] for number in calls)
        flowing = self._flowing_into(start, end)
        comparing = min(COMPARING, 2 * self.timeline.values[compared].bytes) if compared >= 0 else 0
        second_run = flowing + max(self._forward_peak(start, last), self.bytes_of(inner) + comparing)
        forward = self._bare[first.start : second.end]
        return Again(
            needed=tuple(sorted(needed)),
            forward=max(max(forward), forward[-1] + comparing) if forward else 0,
            backward=max(second_run, self._backward_peak(start, end, inner)),
            dropped=self.bytes_of(p for p in inner if p in saved),
            time=sum(self.timeline.work[start:last]),
        )

    def _between(self, start: int, end: int) -> list[tuple[int, int]]:
        return self._saves[bisect_left(self._saves, (start,)) : bisect_left(self._saves, (end,))]

    def _born_in(self, start: int, end: int) -> range:
        return range(bisect_left(self._births, start), bisect_left(self._births, end))

    def _forward_peak(self, start: int, end: int) -> int:
        """The most of what a span makes that lives at a time, while it runs with everything saved."""
        changes = [0] * (end - start + 1)
        for value in (self.timeline.values[place] for place in self._born_in(start, end)):
            changes[value.born - start] += value.bytes
            if value.died + 1 < end:
                changes[value.died + 1 - start] -= value.bytes
        now = most = 0
        for time in range(start, end):
            now += changes[time - start]
            most = max(most, now + self.timeline.workspace[time])
        return most

    def _backward_peak(self, start: int, end: int, places: Collection[int]) -> int:
        """The most that gradients, and what is left of these values, take in the backward of a span."""
        first, last = self._backward_of(start, end)
        values = sorted((self.timeline.values[place] for place in places), key=lambda value: value.died)
        left, most, gone = sum(value.bytes for value in values), 0, 0
        for time in range(first, last + 1):
            while gone < len(values) and values[gone].died < time:
                left -= values[gone].bytes
                gone += 1
            most = max(most, left + self._gradients[time - self.timeline.turn])
        return most

    def _flowing_into(self, start: int, end: int) -> int:
        """What flows back into a span: gradients that live when its backward begins."""
        first, last = self._backward_of(start, end)
        made = range(bisect_left(self._births, self.timeline.turn), bisect_left(self._births, first))
        return (
            self.bytes_of(place for place in made if self.timeline.values[place].died >= first) if last >= first else 0
        )

    def _backward_of(self, start: int, end: int) -> tuple[int, int]:
        """From when to when the backward of a span runs; an empty range where it has none."""
        firsts = [time for time in self._first[start:end] if time >= 0]
        return (min(firsts), max(self._last[start:end])) if firsts else (self.timeline.end, self.timeline.end - 1)

    def _backward_times(self) -> tuple[list[int], list[int]]:
        """For each time of the forward, when its backward begins and ends; −1 where it has none."""
        first, last = [-1] * (self.timeline.turn + 1), [-1] * (self.timeline.turn + 1)
        for number, source in enumerate(self.timeline.source):
            time = self.timeline.turn + number
            first[source] = time if first[source] < 0 else first[source]
            last[source] = time
        return first, last

    def _not_yet_saved(self) -> list[int]:
        """At each time of the forward: what lives and autograd has not saved so far, and the kernel's workspace."""
        turn = self.timeline.turn
        changes = [0] * (turn + 1)
        for place, value in enumerate(self.timeline.values):
            until = min(self.first_saved(place), value.died + 1, turn)
            if value.born < until:
                changes[value.born] += value.bytes
                changes[until] -= value.bytes
        return _summed(changes, self.timeline.workspace[:turn])


def _levels(timeline: Timeline, begin: int, end: int) -> list[int]:
    """At each time of a range: what was made in it and lives, and the kernel's workspace."""
    changes = [0] * (end - begin + 1)
    for value in timeline.values:
        if begin <= value.born < end:
            changes[value.born - begin] += value.bytes
            changes[min(value.died + 1, end) - begin] -= value.bytes
    return _summed(changes, timeline.workspace[begin:end])


def _summed(changes: list[int], more: Collection[int]) -> list[int]:
    now, found = 0, []
    for change, beside in zip(changes, more, strict=False):
        now += change
        found.append(now + beside)
    return found
