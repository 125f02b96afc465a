"""Stages → Plan: what will be done to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from revify.couplings.shipped import additive
from revify.methods import Method
from revify.planning.apart import find_apart
from revify.planning.blocks import find_blocks
from revify.planning.branching import cut_blocks
from revify.planning.budgeting import Subject, fit_into, with_points
from revify.planning.choosing import Run, choose_stages
from revify.planning.containers import ContainerRun, find_containers
from revify.planning.grids import choose_grids, with_grid
from revify.planning.halving import split_stages
from revify.planning.naming import find_named
from revify.planning.refusals import find_refusals
from revify.planning.repeating import add_checkpoints
from revify.planning.stages import Stage, channel_axis, find_runs
from revify.planning.transitions import find_checkpoints
from revify.plans import Plan, Refusal
from revify.reading.draws import drawing, observe_passes
from revify.reading.holding import watch_holdings
from revify.reading.observing import Observation
from revify.reading.recording import follow
from revify.reading.tracing import Example, tensors_of
from revify.stage_plans import BlockPlan, StagePlan
from revify.words import BALANCED, DEFAULT_GRID, SHORT_GRID

WORTH_BEING_APART = 0.9  # of the peak without stages whose steps have something between them


def make_plan(model: nn.Module, example: Example, method: Method, *, foresees: bool = False) -> Plan:
    """Analyse a model and say what would be done to it.

    Args:
        model: any module; it stays as it is.
        example: its inputs, by position or by keyword.
        method: what is asked for.
        foresees: whether the plan says what a training step will need and take, which a budget says in any case.

    Raises:
        RefusalError: the coupling has no inverse, or cannot be parted into single branches.
    """
    passes = observe_passes(model, example)
    observation = passes.fullest
    with drawing(passes.share):
        graph = follow(model, example)
    modules = dict(model.named_modules())
    coded = method.first_step == "coded"
    fixed = frozenset[str]() if coded else passes.skipped  # coded steps have no fixed order and number
    blocks = tuple(b for b in find_blocks(observation, graph, modules) if b.call.path not in fixed)

    def planned(run: Run) -> StagePlan:
        return _stage_plan(run, method, None, observation)

    if method.stages is not None:
        stages: tuple[Run, ...] = find_named(method.stages, model, example, observation, graph, coded=coded)
    else:
        chains = find_runs(blocks, graph)
        containers: tuple[ContainerRun, ...] = ()
        if method.streams == "full" and not method.is_fitted:
            containers = find_containers(model, example, observation, graph, chains)
        cut = {run.path for run in containers}
        apart = find_apart(blocks, chains, cut, observation, graph, modules) if coded else ()

        def chosen(runs: tuple[Run, ...]) -> tuple[Run, ...]:
            return choose_stages(runs, observation, planned, checkpoints=method.transitions == "checkpoint")

        def predicted(stages: tuple[Run, ...]) -> int:
            return _predicted(tuple(map(planned, stages)), observation, method)

        stages = chosen((*chains, *containers))
        if apart:
            more = chosen((*chains, *containers, *apart))
            stages = more if predicted(more) < WORTH_BEING_APART * predicted(stages) else stages
    staged = [path for stage in stages for path in stage.paths]
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    plan = Plan(
        model=type(model).__name__,
        architecture=architecture,
        example=tuple(tuple(x.shape) for x in tensors_of(example)),
        grid=DEFAULT_GRID if method.grid == "auto" else method.grid,
        transitions=method.transitions,
        guard=method.guard,
        stages=tuple(
            _stage_plan(stage, method, channel_axis(stage.paths, stage.shape, observation, modules), observation)
            for stage in stages
        ),
        checkpointed=(),
        refusals=_explained(find_refusals(observation, graph, blocks, staged, modules), fixed),
        saved_bytes=observation.saved_bytes,
        traced=f"by a run, since torch.fx could not trace it: {graph.failure}" if graph.failure else "whole",
    )
    if plan.stages:
        plan = _with_holdings(plan, model, example)
    if plan.stages and method.first_step == "recurrence" and method.grid == "auto":
        with drawing(None):
            plan = choose_grids(plan, model, example)
    elif plan.grid > SHORT_GRID:
        plan = replace(plan, stages=tuple(with_grid(stage, plan.grid) for stage in plan.stages))
    if method.streams == "split":
        plan = split_stages(plan, model, example, method.coupling or additive, observation, graph)
    elif method.unit == "branch":
        with drawing(None):
            plan = cut_blocks(plan, model, example, observation)
    if method.streams == "split" and not plan.stages:
        return plan  # two streams were asked for: less memory alone would not be what was meant
    subject = Subject(model, example, passes)
    if method.budget is not None or (not plan.stages and method.transitions == "checkpoint"):
        return fit_into(plan, subject, method.bytes_allowed)
    if method.transitions == "checkpoint":
        plan = add_checkpoints(plan, model, example, observation, passes.skipped)
    return with_points(plan, subject) if foresees and not plan.is_split else plan


def _predicted(stages: tuple[StagePlan, ...], observation: Observation, method: Method) -> int:
    """The peak of a plan with these stages."""
    plan = Plan("", None, (), 0, method.transitions, stages, (), (), observation.saved_bytes, "")
    checkpointed = find_checkpoints(observation, plan) if stages and method.transitions == "checkpoint" else ()
    return replace(plan, checkpointed=checkpointed).predicted_bytes


def _with_holdings(plan: Plan, model: nn.Module, example: Example) -> Plan:
    """The plan with what its blocks keep by themselves."""
    with drawing(None):
        kept = watch_holdings(model, example, [path for stage in plan.stages for path in stage.paths])

    def noted(stage: StagePlan) -> StagePlan:
        return replace(
            stage, blocks=tuple(replace(b, kept_bytes=sum(kept.get(path, 0) for path in b.paths)) for b in stage.blocks)
        )

    return replace(plan, stages=tuple(map(noted, plan.stages))) if kept else plan


def _explained(refusals: tuple[Refusal, ...], skipped: frozenset[str]) -> tuple[Refusal, ...]:
    """The refusals, with the reason of modules that not every forward pass calls."""
    reason = "is not called in every forward pass: random numbers decide about it (LayerDrop, stochastic depth of its caller)"
    remedy = 'use step="coded", or set that probability to 0, or let the block itself return its input (DropPath)'
    return tuple(Refusal(r.path, reason, remedy) if r.path in skipped else r for r in refusals)


def _stage_plan(run: Run, method: Method, axis: int | None, observation: Observation) -> StagePlan:
    return StagePlan(
        blocks=(_container_plan(run),) if isinstance(run, ContainerRun) else _block_plans(run),
        shape=run.shape,
        dtype=str(run.dtype).removeprefix("torch."),
        stream_bytes=run.stream_bytes,
        bits=method.first_bits,
        predictor=method.first_predictor,
        sign=method.first_sign,
        pattern=BALANCED,
        axis=axis,
        step=method.first_step,
        copied=isinstance(run, ContainerRun) or run.blocks[-1].call.output in observation.passing,
        within=None if isinstance(run, ContainerRun) else run.within,
    )


def _block_plans(run: Stage) -> tuple[BlockPlan, ...]:
    """The blocks of a run, each once."""
    plans: dict[str, BlockPlan] = {}
    seen = {block.stream.key for block in run.blocks}
    for block in run.blocks:
        call, known = block.call, plans.get(block.call.path)
        side = {i.key: i.bytes for i in call.inputs if i.key not in seen}
        seen |= side.keys()
        argument, shortcut = block.stream.argument, block.shortcut.value
        new = BlockPlan(call.path, call.kind, argument, shortcut, call.saved_bytes, result=block.result)
        new = replace(new, side_bytes=sum(side.values()))
        if known is not None:
            sums = known.saved_bytes + new.saved_bytes, known.side_bytes + new.side_bytes
            new = replace(known, saved_bytes=sums[0], side_bytes=sums[1], calls=known.calls + 1)
        plans[call.path] = new
    return tuple(plans.values())


def _container_plan(run: ContainerRun) -> BlockPlan:
    return BlockPlan(
        run.path,
        run.kind,
        0,
        "identity",
        run.saved_bytes,
        branch_bytes=run.saved,
        inputs=run.given,
        run=run.run,
        inner=run.paths,
    )
