"""Runs of residual blocks that overlap → the stages with the least predicted peak of the whole plan.

Runs exist at several depths of the module tree, and shut each other out: three groups of six blocks are one run of
three steps, or three runs of six. Their calls are intervals on the axis of the forward pass:

    groups   ├────────────┼────────────┼────────────┤      a run, and each part of it that begins and ends at a block
    blocks   ├─┼─┼─┼─┼─┼─┤├─┼─┼─┼─┼─┼─┤├─┼─┼─┼─┼─┼─┤      with a run inside

A set of stages is a way along the axis. What it costs so far is four numbers, and a way that is no better than another in
any of them is given up: a dynamic programme, whose best way is the best of all sets of runs that do not interleave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from revify.planning.containers import ContainerRun
from revify.planning.stages import Stage
from revify.reading.observing import Call, Observation
from revify.stage_plans import StagePlan

Run = Stage | ContainerRun

WORTH_A_RERUN = 0.005  # of the model's saved bytes, that running modules again must save
MOST_PARTS = 400  # of runs that are tried
WIDEST = 200  # ways to one place that are followed


def choose_stages(
    runs: Sequence[Run], observation: Observation, planned: Callable[[Run], StagePlan], *, checkpoints: bool
) -> tuple[Run, ...]:
    """The stages of a model, in the order of their calls; no module is in two of them.

    Args:
        runs: all runs of blocks, at every depth.
        observation: of the model.
        planned: a run → what it would be in the plan, which says what it holds.
        checkpoints: whether what lies outside of the stages is checkpointed.
    """
    axis = _Axis(observation, runs, checkpoints=checkpoints)
    pieces = [_Piece(part, axis, planned(part)) for part in parts_of(runs)]
    pieces.sort(key=lambda piece: (piece.start, piece.end))
    chosen = list(_best_way(pieces, axis))
    for run in sorted(runs, key=lambda run: -run.benefit):  # runs that interleave with the chosen ones
        if run.benefit > 0 and not any(run.overlaps(stage) for stage in chosen):
            chosen.append(run)
    return tuple(sorted(chosen, key=lambda stage: stage.start))


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a part of the forward pass does to the predicted peak.

    Args:
        saved: bytes that autograd no longer saves, negative.
        held: bytes that are held instead.
        peak: the most that is held within it, above what was held before.
        steps: what the stages hold and what their largest steps save: of ways with the same peak, the finer are taken.
    """

    saved: int = 0
    held: int = 0
    peak: int = 0
    steps: int = 0

    def then(self, other: _Cost) -> _Cost:
        """This part, and after it the other."""
        peak = max(self.peak, self.held + other.peak)
        return _Cost(self.saved + other.saved, self.held + other.held, peak, self.steps + other.steps)

    @property
    def total(self) -> int:
        """The peak, if nothing else came."""
        return self.saved + self.peak

    @property
    def order(self) -> tuple[int, int, int]:
        """What is compared, the most important first."""
        return self.total, self.saved + self.steps, self.saved + self.held

    def no_worse(self, other: _Cost) -> bool:
        """Whether nothing that may follow makes the other the better one."""
        return (
            self.saved <= other.saved
            and self.saved + self.held <= other.saved + other.held
            and self.total <= other.total
            and self.saved + self.steps <= other.saved + other.steps
        )


@dataclass(frozen=True, slots=True)
class _Way:
    """Stages chosen up to some place, the last first, and their cost."""

    cost: _Cost
    stage: Run | None = None
    before: _Way | None = None

    def stages(self) -> list[Run]:
        """In the order of their calls."""
        found, way = list[Run](), self
        while way.stage is not None and way.before is not None:
            found.append(way.stage)
            way = way.before
        return found[::-1]


class _Axis:
    """The forward pass: what lies between two places of it costs, without a stage in it."""

    def __init__(self, observation: Observation, runs: Sequence[Run], *, checkpoints: bool) -> None:
        self.end = len(observation.calls)
        self._calls = observation.calls
        self._counts = Counter(call.path for call in observation.calls)
        self._passing = observation.passing
        self._worth = WORTH_A_RERUN * observation.saved_bytes
        self._checkpoints = checkpoints
        self._steps = {span[0] for run in runs for span in run.spans}
        self._known: dict[tuple[int, int], _Cost] = {}

    def between(self, start: int, end: int) -> _Cost:
        """The largest modules that lie there and are no blocks of a run, each checkpointed where that pays."""
        if (start, end) not in self._known:
            cost, place = _Cost(), start
            while place < end and self._checkpoints:
                call = self._calls[place]
                if place in self._steps and call.end <= end:
                    place = call.end  # it is in a stage or kept: a run of two holds no less than two checkpoints
                elif call.end <= end and self._steps.isdisjoint(range(place, call.end)):
                    cost, place = cost.then(self._alone(call)), call.end
                else:
                    place += 1
            self._known[start, end] = cost
        return self._known[start, end]

    def _alone(self, call: Call) -> _Cost:
        given = sum(i.bytes for i in call.inputs)
        lasting = not any(i.changed or i.key in self._passing for i in call.inputs)
        if self._counts[call.path] > 1 or not lasting or call.saved_bytes - given <= self._worth:
            return _Cost()
        return _Cost(-call.saved_bytes, given, given + call.saved_bytes)


class _Piece:
    """A stage on the axis."""

    def __init__(self, stage: Run, axis: _Axis, plan: StagePlan) -> None:
        self.stage, self.start, self.end = stage, stage.start, stage.end
        cost = _Cost()
        for (_, end), (start, _) in pairwise(stage.spans):
            cost = cost.then(axis.between(end, start))
        held = plan.held_bytes
        most = held + plan.largest_block_bytes
        self.cost = cost.then(_Cost(-plan.saved_bytes, held, most, most))


def parts_of(runs: Sequence[Run]) -> list[Run]:
    """The runs, and their parts that begin and end beside a block that has a run inside: elsewhere nothing is to be had."""
    wholes: list[Run] = [run for run in runs if isinstance(run, ContainerRun)]
    chains = [run for run in runs if isinstance(run, Stage)]
    parts: list[Stage] = []
    for run in chains:
        inner = {place for place, span in enumerate(run.spans) if any(_within(other, span) for other in runs)}
        ends = sorted({0, len(run.spans)} | inner | {place + 1 for place in inner})
        parts += [run.part(a, b) for a, b in combinations(ends, 2) if b - a > 1]
    return [*wholes, *(parts if len(parts) <= MOST_PARTS else chains)]


def _within(run: Run, span: tuple[int, int]) -> bool:
    return span[0] < run.start and run.end <= span[1]


def _best_way(pieces: Sequence[_Piece], axis: _Axis) -> list[Run]:
    origin = _Way(_Cost())
    ways: list[tuple[int, list[_Way]]] = [(0, [origin])]
    for piece in pieces:
        found = [
            _Way(way.cost.then(axis.between(end, piece.start)).then(piece.cost), piece.stage, way)
            for end, reached in ways
            if end <= piece.start
            for way in reached
        ]
        ways.append((piece.end, _undominated(found)))
    last = [
        _Way(way.cost.then(axis.between(end, axis.end)), way.stage, way.before)
        for end, reached in ways
        for way in reached
    ]
    best = min(last, key=lambda way: way.cost.order)
    return best.stages()


def _undominated(ways: Iterable[_Way]) -> list[_Way]:
    """The ways that may still be the best; of more than are followed, those of the lowest peak."""
    kept: list[_Way] = []
    for way in sorted(ways, key=lambda way: way.cost.order):
        if not any(other.cost.no_worse(way.cost) for other in kept):
            kept.append(way)
    return kept[:WIDEST]
