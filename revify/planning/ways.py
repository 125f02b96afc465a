"""Model, plan, timeline → the ways through its forward pass: what may be kept, run again, or coded, and what each costs.

Places are times at which calls of modules begin or end. From each leads a piece that keeps what lies up to the next place,
one for each call (or chain of calls, each on what the one before returned) that begins there and may run again, and one for
a block of a coded stage. What a piece costs depends on what came before it:

    inside a coded run   the block before left a code, so this one costs a code; else the run begins with a value that is held
    a dropped value      what a piece returned that runs again is held by nobody: who saves it next, holds it

so a place of the solver is a time with these two.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from revify.planning.costs import Again, Costs
from revify.planning.fastest import LEVELS, Piece, Ways
from revify.reading.observing import Call, Observation, ValueKey
from revify.reading.timeline import Span
from revify.runtime.codes import code_bytes
from revify.stage_plans import BlockPlan, StagePlan

WORTH_A_RERUN = 0.002  # of what is held in all, that running modules again must save
LONGEST = 8  # calls in a row that may share a checkpoint
CODING = 60  # bytes that are moved for each element that is coded and decoded
RUNNING_VALUES = 3  # of the stream, while a code is made in forward


@dataclass(frozen=True, slots=True)
class Context:
    """What a piece must know of those before it.

    Args:
        run: the stage whose coded run goes on, −1 where there is none.
        dropped: the place, among the timeline's values, of what was returned last and is held by nobody; −1 for none.
    """

    run: int = -1
    dropped: int = -1


@dataclass(frozen=True, slots=True)
class Option:
    """A part of the forward pass that may run again.

    Args:
        start: the time when it begins.
        end: the time when it has returned.
        paths: of the modules, each called on what the one before returned.
        returned: the place of what it returns, among the timeline's values; −1 where that is not one value.
        again: what it costs.
        saved_bytes: what plain autograd saves in it.
        stage: of which it is a block, −1 where it is no block that a stage codes.
        block: which block of that stage.
    """

    start: int
    end: int
    paths: tuple[str, ...]
    returned: int
    again: Again
    saved_bytes: int
    stage: int = -1
    block: int = -1


@dataclass(frozen=True, slots=True)
class Choice(Piece):
    """A piece of a way, and what it does.

    Args:
        mode: "keep", "recompute", or "step", the step of its stage.
        option: what runs again, None where nothing does.
    """

    mode: str
    option: Option | None


class Map:
    """All that may be done with a model.

    Args:
        observation: of its forward pass.
        stages: of its plan.
        costs: of spans of the same forward pass.
        excluded: the paths of modules that must not run again outside of a stage.
        checkpoints: whether anything outside of the stages' blocks may run again.
    """

    def __init__(
        self,
        observation: Observation,
        stages: Sequence[StagePlan],
        costs: Costs,
        *,
        excluded: Collection[str] = (),
        checkpoints: bool = True,
    ) -> None:
        self.costs = costs
        self._ways: dict[int, Ways[Choice]] = {}
        self._observation, self._stages = observation, stages
        self._spans = costs.timeline.spans
        self.blocks = tuple(sorted(self._blocks(), key=lambda option: (option.stage, option.start)))
        fixed = [option for option in self.blocks if not _may_be_left(stages[option.stage])]
        own = {option.paths[0] for option in self.blocks}
        allowed = [call for call in self._allowed(excluded) if checkpoints or call.path in own]
        self.reruns = tuple(o for o in self._reruns(allowed) if not any(_overlap(o, block) for block in fixed))
        self._fixed = {option.start for option in fixed}
        self._starting: dict[int, list[tuple[Option, str]]] = defaultdict(list)
        for mode, options in (("step", self.blocks), ("recompute", self.reruns)):
            for option in options:
                self._starting[option.start].append((option, mode))
        times = {time for o in (*self.blocks, *self.reruns) for time in (o.start, o.end)} | {0, costs.timeline.turn}
        self._times = sorted(t for t in times if not any(o.start < t < o.end for o in fixed))
        self._until = [max(value.saved, default=-1) for value in costs.timeline.values]
        for option in (*self.blocks, *self.reruns):
            for place in option.again.needed:
                self._until[place] = max(self._until[place], option.start)
        neighbours = [(a, b) for a, b in pairwise(self.blocks) if a.stage == b.stage]
        self._between = [(a.stage, a.end, b.start) for a, b in neighbours]
        self._stream = {b.start: a.returned for a, b in neighbours}  # what a block is given by the one before

    def _pieces(self) -> tuple[list[Choice], int]:
        """All pieces, between numbered places, and the number of the last place."""
        found: list[tuple[tuple[int, Context], tuple[int, Context], Choice]] = []
        reached: dict[int, dict[Context, None]] = defaultdict(dict, {0: {Context(): None}})
        for number, time in enumerate(self._times[:-1]):
            for context in reached[time]:
                for end, after, choice in self._from(time, self._times[number + 1], context):
                    place = (end, Context() if end == self._times[-1] else after)
                    reached[end][place[1]] = None
                    found.append(((time, context), place, choice))
        order = [(time, context) for time in self._times for context in reached[time]]
        numbers = {place: number for number, place in enumerate(order)}
        pieces = [replace(choice, start=numbers[start], end=numbers[end]) for start, end, choice in found]
        return pieces, len(order) - 1

    def ways(self, levels: int = LEVELS) -> Ways[Choice]:
        """All ways through the model, with held bytes counted in so many steps."""
        if levels not in self._ways:
            self._ways[levels] = Ways(*self._pieces(), levels)
        return self._ways[levels]

    def along(self, reruns: Collection[Option], steps: Collection[Option] = ()) -> tuple[Choice, ...]:
        """The way on which these run again, or are steps, and nothing else is done; none of them overlap."""
        way, context, time = list[Choice](), Context(), 0
        asked = {option.start: (option, "recompute") for option in reruns} | {o.start: (o, "step") for o in steps}
        for following in self._times[1:]:
            if time >= following:
                continue
            found = asked.get(time)
            if found is None:
                time, context, choice = self._keeping(time, following, context)
            else:
                time, context, choice = (self._step if found[1] == "step" else self._rerun)(found[0], context)
            way.append(choice)
        return tuple(way)

    def _from(self, time: int, following: int, context: Context) -> Iterator[tuple[int, Context, Choice]]:
        if time not in self._fixed:
            yield self._keeping(time, following, context)
        for option, mode in self._starting[time]:
            yield self._rerun(option, context) if mode == "recompute" else self._step(option, context)

    def _keeping(self, time: int, following: int, context: Context) -> tuple[int, Context, Choice]:
        kept = self.costs.kept(time, following)
        dropped = context.dropped
        saves = dropped >= 0 and dropped in self.costs.saved_in(time, following)
        more = self.costs.bytes_of([dropped]) if saves and self.costs.first_saved(dropped) < time else 0
        inside = any(s == context.run and a <= time and following <= b for s, a, b in self._between)
        after = Context(context.run if inside else -1, -1 if saves else self._open(dropped, following))
        return following, after, Choice(0, 0, kept.held + more, kept.peak + more, 0.0, "keep", None)

    def _held(self, option: Option, context: Context, had: int = -1) -> int:
        """What must be held for a second run and is not held anyway; one of the values may be had otherwise."""
        return self.costs.bytes_of(
            place
            for place in option.again.needed
            if place != had and (place == context.dropped or self.costs.first_saved(place) >= option.start)
        )

    def _rerun(self, option: Option, context: Context) -> tuple[int, Context, Choice]:
        held, again = self._held(option, context), option.again
        beside = max(again.backward, again.forward - self.costs.bytes_of(again.needed))
        choice = Choice(0, 0, held, held + max(beside, 0), again.time, "recompute", option)
        return option.end, Context(-1, self._lost(option)), choice

    def _lost(self, option: Option) -> int:
        """What a piece returned and had saved itself, so that nobody else seems to save it first; −1 where there is no such."""
        saved = option.returned >= 0 and self.costs.first_saved(option.returned) < option.end
        return self._open(option.returned, option.end) if saved else -1

    def _open(self, place: int, time: int) -> int:
        """A value, −1 where from some time on nobody may hold it."""
        return place if place >= 0 and self._until[place] >= time else -1

    def _step(self, option: Option, context: Context) -> tuple[int, Context, Choice]:
        stage = self._stages[option.stage]
        block, again = stage.blocks[option.block], option.again
        goes_on = context.run == option.stage
        if stage.step == "coded":
            codes = len(block.steps) - (0 if goes_on else 1)
            had = self._stream[option.start] if goes_on else -1
            held = code_bytes(stage.shape, stage.bits) * codes + self._held(option, context, had)
            running = stage.stream_bytes if goes_on else 0
        else:
            held = stage.held_bytes if option.block == 0 else 0
            running = RUNNING_VALUES * stage.stream_bytes
        held += block.kept_bytes
        beside = max(
            running + round(again.backward * _largest_share(block)),
            RUNNING_VALUES * stage.stream_bytes + again.forward - self.costs.bytes_of(again.needed),
        )
        elements = stage.stream_bytes // stage.element_bytes
        time = again.time + CODING * elements * len(block.steps)
        choice = Choice(0, 0, held, held + max(beside, 0), time, "step", option)
        return option.end, Context(option.stage, self._lost(option)), choice

    def _blocks(self) -> Iterator[Option]:
        """The blocks of the stages; those that a container adds to are a step of all the modules that it calls."""
        orders: dict[str, list[Call]] = defaultdict(list)
        for call in self._observation.calls:
            orders[call.path].append(call)
        for number, stage in enumerate(self._stages):
            for place, block in enumerate(stage.blocks):
                calls = sorted((call for path in block.paths for call in orders[path]), key=lambda call: call.order)
                for own in [[call] for call in calls] if block.calls > 1 else [calls]:
                    yield self._option(own, block.saved_bytes // block.calls, (number, place))

    def _allowed(self, excluded: Collection[str]) -> Iterator[Call]:
        counts = Counter(call.path for call in self._observation.calls)
        passing = self._observation.passing
        for call in self._observation.calls:
            lasting = call.inputs and not any(i.changed or i.key in passing for i in call.inputs)
            returns = call.output is not None or call.results
            span = self._spans[call.order]
            if span.start == span.end:  # it does nothing
                continue
            if counts[call.path] == 1 and call.path not in excluded and lasting and returns:
                yield call

    def _reruns(self, allowed: Sequence[Call]) -> Iterator[Option]:
        """Calls, and chains of calls, whose second run saves enough."""
        worth = WORTH_A_RERUN * self.costs.kept(0, self.costs.timeline.turn).held
        given: dict[tuple[int, ValueKey], list[Call]] = defaultdict(list)
        for call in allowed:
            if len(call.inputs) == 1 and call.inputs[0].argument == 0:
                given[self._spans[call.order].start, call.inputs[0].key].append(call)
        known: set[tuple[int, int]] = set()
        for call in allowed:
            chains = [[call]]
            while chains:
                chain = chains.pop(0)
                last = chain[-1]
                span = self._spans[call.order].start, self._spans[last.order].end
                if span in known:  # the same by other modules: a container and what it calls
                    continue
                known.add(span)
                option = self._option(chain, sum(c.saved_bytes for c in chain))
                if option.again.dropped - self.costs.bytes_of(option.again.needed) > worth:
                    yield option
                if len(chain) < LONGEST and last.output is not None:
                    chains += [[*chain, other] for other in given[span[1], last.output]]

    def _option(self, calls: Sequence[Call], saved_bytes: int, block: tuple[int, int] = (-1, -1)) -> Option:
        first, last = self._spans[calls[0].order], self._spans[calls[-1].order]
        again = self.costs.again(first.start, last.end, (calls[0].order, calls[-1].order), first.given)
        return Option(
            first.start, last.end, tuple(c.path for c in calls), _only(last), again, saved_bytes, block[0], block[1]
        )


def _may_be_left(stage: StagePlan) -> bool:
    """Whether its blocks may be kept, or run again, as if they were in no stage: coded steps are the same function."""
    return stage.step == "coded" and not stage.coupling and stage.within is None


def _largest_share(block: BlockPlan) -> float:
    """Of what a block saves, the largest part that one of its steps saves."""
    return max(block.branch_bytes) / max(block.saved_bytes, 1) if block.branch_bytes else 1.0


def _overlap(one: Option, other: Option) -> bool:
    return one.start < other.end and other.start < one.end


def _only(span: Span) -> int:
    return span.returned[0] if len(span.returned) == 1 else -1
