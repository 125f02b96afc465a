"""Plan + budget → the fastest plan that fits: which blocks are coded, which modules run again, and what is kept.

What each of them costs follows from one training step on tensors without data (`reading.timeline`, `costs`); which ways
there are through the model from its calls (`ways`); and the fastest of them within the budget from the solver (`fastest`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from revify.errors import RevifyError
from revify.estimates import CHECKPOINTED, PLAIN, THIS_PLAN, WITHIN, Point
from revify.planning.costs import Costs
from revify.planning.fastest import FEW_LEVELS, peak_of
from revify.planning.refusals import in_sequence, parents
from revify.planning.repeating import REMEDY, run_twice
from revify.planning.ways import Choice, Map, Option
from revify.plans import CheckpointPlan, Plan, Refusal
from revify.reading.draws import Passes, drawing
from revify.reading.flows import device_of, holds_data
from revify.reading.timeline import draw_timeline
from revify.reading.tracing import Example

Budget = int | str  # bytes, or "min"

POINTS = 6  # budgets along the frontier
SLOWER = 1.02  # of checkpointing's step, that a model without stages may take where no budget is given


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned.

    Args:
        model: the plain model; it stays as it is.
        example: its inputs.
        passes: what was observed of it.
    """

    model: nn.Module
    example: Example
    passes: Passes


def fit_into(plan: Plan, subject: Subject, budget: Budget | None) -> Plan:
    """The fastest plan that fits into a budget, with the stages of the given one.

    Args:
        plan: with stages, and nothing checkpointed so far.
        subject: what it is a plan of.
        budget: bytes; "min" for as few as possible; None for as few as can be had in the time of checkpointing.

    Raises:
        RevifyError: nothing fits.
    """
    reasons: dict[str, str] = {}
    tried: set[str] = set()
    try:
        costs = _costs(subject)
    except RevifyError:
        if budget is None:  # a model without a stage, of which nothing can be said
            return plan
        raise
    while True:
        found = _map(plan, subject, costs, reasons)
        way = _chosen(found, plan, subject, budget)
        paths = {path for option in _of(way, "recompute") for path in option.paths}
        new = paths - tried
        if not new or not holds_data(subject.model):
            break
        tried |= new
        different = run_twice(subject.model, subject.example, new)
        reasons |= different
        if not different:
            break
    left_out = (Refusal(path, reason, REMEDY) for path, reason in reasons.items())
    plan = replace(_with_way(plan, found, way), refusals=(*plan.refusals, *left_out))
    return replace(plan, points=_points(found, plan, subject, way))


def with_points(plan: Plan, subject: Subject) -> Plan:
    """The plan with what its training step is predicted to need and to take, beside those of others.

    Args:
        plan: complete.
        subject: what it is a plan of.

    Returns:
        The plan, as it was where its step cannot be run without data.
    """
    try:
        costs = _costs(subject)
    except RevifyError:  # nobody asked for a budget: the plan says nothing of what its step needs
        return plan
    found = _map(plan, subject, costs, ())
    again = {checkpoint.paths for checkpoint in plan.checkpointed}
    options = [option for option in found.reruns if option.paths in again]
    steps = [block for block in found.blocks if plan.stages[block.stage].blocks[block.block].mode is None]
    return replace(plan, points=_points(found, plan, subject, found.along(options, steps)))


def _costs(subject: Subject) -> Costs:
    with drawing(subject.passes.share):
        kind = device_of(subject.model).type
        device = "cpu" if kind == "meta" else kind
        timeline = draw_timeline(subject.model, subject.example, device=device)
        bare = draw_timeline(subject.model, subject.example, training=False, device=device)
    if len(timeline.spans) != len(subject.passes.fullest.calls) or len(bare.spans) != len(timeline.spans):
        raise RevifyError(
            f"{type(subject.model).__name__} calls other modules with gradients than without, or in each forward pass, so "
            "what a step of it needs cannot be predicted. Leave budget= out."
        )
    return Costs(timeline, bare)


def _map(plan: Plan, subject: Subject, costs: Costs, reasons: Collection[str]) -> Map:
    return Map(
        subject.passes.fullest,
        plan.stages,
        costs,
        excluded={*subject.passes.skipped, *reasons},
        checkpoints=plan.transitions == "checkpoint",
    )


def _chosen(found: Map, plan: Plan, subject: Subject, budget: Budget | None) -> tuple[Choice, ...]:
    """The way that was asked for."""
    ways = found.ways()
    if budget is None:
        usual = _checkpointed(found, plan, subject)
        way = ways.smallest(SLOWER * _time(usual))
        if way is None or not any(
            choice.option for choice in way
        ):  # so small that only what is held falls, not the peak
            way = usual
    else:
        way = ways.fastest(ways.least() if budget == "min" else int(budget))
    if way is not None:
        return way
    least, shapes = ways.least(), ", ".join("×".join(map(str, shape)) for shape in plan.example)
    raise RevifyError(
        f"{plan.model} does not fit into budget={budget}: for inputs of shape {shapes}, the least that any plan needs is "
        f"predicted to be {least} bytes ({least / 2**20:.1f} MiB); ordinary autograd needs "
        f"{found.costs.plain_peak / 2**20:.1f} MiB. Give a larger budget, or a smaller batch."
    )


def _checkpointed(found: Map, plan: Plan, subject: Subject) -> tuple[Choice, ...]:
    """The way of checkpointing: each block runs again, and what stands beside blocks in the same sequence."""
    plain = found if not plan.stages else _map(replace(plan, stages=()), subject, found.costs, ())
    modules = dict(subject.model.named_modules())
    blocks = {path for stage in plan.stages for path in stage.paths}
    calls = subject.passes.fullest.calls
    beside = {call.path for call in calls if in_sequence(call, modules) and list(modules[call.path].children())}
    above = {parent for path in blocks for parent in parents(path)}
    wanted = (blocks | beside) - above
    options, end = list[Option](), 0
    for option in sorted(plain.reruns, key=lambda option: (option.start, -option.end)):
        if len(option.paths) == 1 and option.start >= end and (not wanted or option.paths[0] in wanted):
            options.append(option)
            end = option.end
    return plain.along(options)


def _points(found: Map, plan: Plan, subject: Subject, way: Sequence[Choice]) -> tuple[Point, ...]:
    """What is predicted of this way, and of others."""
    work, most = found.costs.work, found.costs.plain_peak

    def point(name: str, way: Sequence[Choice]) -> Point:
        return Point(name, peak_of(way), round(1 + _time(way) / work, 4))

    ways = found.ways(FEW_LEVELS)
    least = ways.least()
    budgets = [round(least * (max(most, least) / least) ** (number / POINTS)) for number in range(POINTS)]
    others = dict.fromkeys(fits for budget in budgets if (fits := ways.fastest(budget)) is not None)
    return (
        Point(PLAIN, most, 1.0),
        point(CHECKPOINTED, _checkpointed(found, plan, subject)),
        point(THIS_PLAN, way),
        *(point(WITHIN, other) for other in others),
    )


def _with_way(plan: Plan, found: Map, way: Sequence[Choice]) -> Plan:
    """The plan that takes this way."""
    steps = {(option.stage, option.block) for option in _of(way, "step")}
    covered = {path for option in _of(way, "recompute") for path in option.paths}
    ends = [max(o.end for o in found.blocks if o.stage == number) for number, _ in enumerate(plan.stages)]

    def mode(stage: int, block: int) -> str | None:
        if (stage, block) in steps:
            return None
        paths = plan.stages[stage].blocks[block].paths
        again = all(not covered.isdisjoint((path, *parents(path)[1:])) for path in paths)
        return "recompute" if again else "keep"

    stages = tuple(
        replace(stage, blocks=tuple(replace(b, mode=mode(number, place)) for place, b in enumerate(stage.blocks)))
        for number, stage in enumerate(plan.stages)
    )
    checkpoints = tuple(
        CheckpointPlan(
            option.paths[0],
            option.saved_bytes,
            choice.held,
            option.paths[1:],
            after=sum(end <= option.start for end in ends),
        )
        for choice in way
        if choice.mode == "recompute" and (option := choice.option) is not None
    )
    return replace(plan, stages=stages, checkpointed=checkpoints)


def _of(way: Iterable[Choice], mode: str) -> list[Option]:
    return [choice.option for choice in way if choice.mode == mode and choice.option is not None]


def _time(way: Iterable[Choice]) -> float:
    return sum(choice.time for choice in way)
