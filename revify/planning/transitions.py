"""What lies outside of the stages → which modules run again in backward, and which of them together.

A checkpoint holds what its module was given. Of modules that are called one after the other, each on what the one before
returned (a stem of convolution, norm, activation and pooling), a common checkpoint holds only what the first was given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from revify.planning.refusals import parents
from revify.plans import CheckpointPlan, Plan
from revify.reading.observing import Call, Observation, ValueKey
from revify.stage_plans import StagePlan

WORTH_A_RERUN = 0.005  # of the model's saved bytes, that running modules again must save
LARGEST = 3  # of the modules that are tried to be parted


def find_checkpoints(observation: Observation, plan: Plan, parted: Iterable[str] = ()) -> tuple[CheckpointPlan, ...]:
    """What is to be checkpointed outside of the stages, in the order of the calls.

    At first the largest modules without a stage in them are checkpointed, where that pays. Those that hold most when they
    run again are parted into their children, as long as that lowers the predicted peak of the model by more than it adds to
    what is held. Then neighbours are joined, one pair at a time, as long as less is held and the peak does not rise.

    Args:
        observation: of the model.
        plan: its stages, without checkpoints.
        parted: the paths of modules that are not to be checkpointed as a whole.
    """
    opened_up = set(parted)
    pieces = list(_pieces(observation, plan, opened_up))
    while opened := _part(pieces, observation, plan, opened_up):
        pieces = opened
    while joined := _join(pieces, plan):
        pieces = joined
    return tuple(piece.plan for piece in pieces if piece.pays)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Modules that are called one after the other.

    Args:
        plan: what it would be as a checkpoint.
        given: the only value that the first was given, None where there are several.
        output: what the last returns.
        possible: whether what its first module is given stays as it is, so that it can be kept.
        worth: how many bytes a checkpoint must save.
    """

    plan: CheckpointPlan
    given: ValueKey | None
    output: ValueKey | None
    possible: bool
    worth: float

    @property
    def pays(self) -> bool:
        """Whether it is checkpointed: where that saves enough."""
        return self.possible and self.plan.saved_bytes - self.plan.input_bytes > self.worth

    @property
    def held_bytes(self) -> int:
        """What it holds until its backward."""
        return self.plan.input_bytes if self.pays else self.plan.saved_bytes

    def follows(self, other: _Piece) -> bool:
        """Whether it is called on what the other returned, with no stage between them."""
        return self.given is not None and self.given == other.output and self.plan.after == other.plan.after

    def joined(self, following: _Piece) -> _Piece:
        """Both as one checkpoint."""
        plan = replace(
            self.plan,
            joined=(*self.plan.joined, following.plan.path, *following.plan.joined),
            saved_bytes=self.plan.saved_bytes + following.plan.saved_bytes,
        )
        return replace(self, plan=plan, output=following.output)


def _pieces(observation: Observation, plan: Plan, parted: set[str]) -> Iterator[_Piece]:
    """The largest modules without a stage in them and not parted, each called once, in the order of their calls."""
    inside = {path for stage in plan.stages for path in stage.paths}
    above = {parent for path in inside for parent in parents(path)} | {""} | parted
    known = inside | above
    counts = Counter(call.path for call in observation.calls)
    calls = {call.path: call for call in observation.calls}
    last = [calls[stage.paths[-1]] for stage in plan.stages]
    ends = {call.output for call, stage in zip(last, plan.stages, strict=True) if _holds_its_output(stage)}
    for call in observation.calls:
        called = [parent for parent in parents(call.path) if counts[parent]]
        largest = call.path not in known and above.issuperset(called)
        if largest and counts[call.path] == 1 and (call.output is not None or call.results):
            after = sum(end.order < call.order for end in last)
            held = sum(i.bytes for i in call.inputs if i.key not in ends)  # a stage holds its output anyway
            yield _Piece(
                CheckpointPlan(call.path, call.saved_bytes, held, after=after),
                _only_input(call),
                call.output,
                not any(i.changed or i.key in observation.passing for i in call.inputs),
                WORTH_A_RERUN * observation.saved_bytes,
            )


def _holds_its_output(stage: StagePlan) -> bool:
    """Whether what leaves the stage is the value that it holds, not a shorter-typed or joined copy."""
    same = stage.element_bytes == getattr(torch, stage.dtype).itemsize
    return not stage.coupling and stage.step == "recurrence" and same


def _only_input(call: Call) -> ValueKey | None:
    return call.inputs[0].key if len(call.inputs) == 1 and call.inputs[0].argument == 0 else None


def _part(pieces: list[_Piece], observation: Observation, plan: Plan, parted: set[str]) -> list[_Piece] | None:
    """The pieces with one of the largest parted into its children, None where that does no good; notes it in `parted`."""
    before = _peak(pieces, plan) + _held(pieces, observation)
    for piece in sorted((p for p in pieces if p.pays), key=lambda p: -p.plan.saved_bytes)[:LARGEST]:
        candidate = list(_pieces(observation, plan, parted | {piece.plan.path}))
        if _peak(candidate, plan) + _held(candidate, observation) < before:
            parted.add(piece.plan.path)
            return candidate
    return None


def _join(pieces: list[_Piece], plan: Plan) -> list[_Piece] | None:
    """The pieces with that pair joined that does most for the predicted peak, None where no pair does any good."""
    best, best_peak, best_gain = None, _peak(pieces, plan), 0
    for place, (first, second) in enumerate(pairwise(pieces)):
        if not second.follows(first):
            continue
        both = first.joined(second)
        gain = first.held_bytes + second.held_bytes - both.held_bytes
        wanted = 0 if first.pays and second.pays else first.worth  # where nothing runs again that did not
        if gain <= wanted:
            continue
        candidate = [*pieces[:place], both, *pieces[place + 2 :]]
        found = _peak(candidate, plan)
        if (found, -gain) < (best_peak, -best_gain):
            best, best_peak, best_gain = candidate, found, gain
    return best


def _peak(pieces: list[_Piece], plan: Plan) -> int:
    """What the model would hold at most."""
    return replace(plan, checkpointed=tuple(piece.plan for piece in pieces if piece.pays)).predicted_bytes


def _held(pieces: list[_Piece], observation: Observation) -> int:
    """What is held outside of the stages at the end of the forward pass, but for what they hold in any case."""
    return observation.saved_bytes - sum(p.plan.saved_bytes - p.plan.input_bytes for p in pieces if p.pays)
