"""The plan: what will be done to a model, as a frozen record that prints as a table and goes through JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

from revify.couplings.formulas import Formula
from revify.errors import RevifyError
from revify.estimates import THIS_PLAN, Frontier, Point
from revify.old_plans import as_written_now
from revify.plan_faults import plan_faults
from revify.records import STORED, Among, FaultError, Prose, Range, parse, plain, read, shown
from revify.runtime.grid import Grid
from revify.stage_plans import Bytes, Size, StagePlan
from revify.tables import draw_plan
from revify.words import MAX_GRID

FORMAT = 1

Resolution = Annotated[int, Range(0, MAX_GRID)]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A part of the model that is left as it is.

    Args:
        path: of the module.
        reason: what was found.
        remedy: what to do instead.
    """

    path: str
    reason: Prose
    remedy: Prose


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """Modules outside of the stages that run again in backward, from the kept input of the first.

    Args:
        path: of the first.
        saved_bytes: what plain autograd saves in all of them.
        input_bytes: what is kept, beside what a stage keeps anyway.
        joined: the paths of those after it, each called on what the one before it returned.
        after: how many stages run before it.
    """

    path: str
    saved_bytes: Bytes
    input_bytes: Bytes
    joined: tuple[str, ...] = ()
    after: Annotated[int, Range(0, 2**16)] = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """All of its modules."""
        return (self.path, *self.joined)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `convert` will do to a model.

    Args:
        model: its class name.
        architecture: its name in timm, where known.
        example: the shapes of the inputs it was analysed with.
        grid: resolution q of the grid, in bits behind the binary point, of the stages that say nothing else.
        transitions: "keep" or "checkpoint".
        stages: what becomes reversible.
        checkpointed: what lies outside of the stages and is checkpointed.
        refusals: what looks like a block and is left as it is.
        saved_bytes: what plain autograd saves for the example.
        traced: how the structure was found: "whole" or, where the whole model cannot be traced, why not.
        points: peak and time of a training step, predicted: plain, checkpointed, of this plan, and of others on the way from
            the least to the fastest; empty where nothing was predicted.
        unmeasured: where the grid was to be chosen, why nothing could be measured for that; else "".
        guard: in what second runs are compared with the first, "bits" or "shapes".
        couplings: formulas of your own that the stages name. They live in this process only: a plan that went through JSON
            has names, and is given the formulas when it is read.
    """

    model: str
    architecture: str | None
    example: tuple[tuple[Size, ...], ...]
    grid: Resolution
    transitions: Annotated[str, Among(("keep", "checkpoint"))]
    stages: tuple[StagePlan, ...]
    checkpointed: tuple[CheckpointPlan, ...]
    refusals: tuple[Refusal, ...]
    saved_bytes: Bytes
    traced: Prose
    unmeasured: Prose = ""
    guard: Annotated[str, Among(("bits", "shapes"))] = "bits"
    points: tuple[Point, ...] = field(default=(), compare=False)
    couplings: tuple[Formula, ...] = field(default=(), compare=False, repr=False, metadata={STORED: False})

    def faults(self) -> Iterator[str]:
        """What does not go together, in sentences."""
        return plan_faults(self)

    def grid_of(self, stage: StagePlan) -> Grid:
        """The grid of one of its stages."""
        return Grid(self.grid if stage.grid is None else stage.grid)

    @property
    def stage_share(self) -> float:
        """The share of the saved bytes that lies inside the stages, 0…1."""
        return sum(stage.saved_bytes for stage in self.stages) / max(self.saved_bytes, 1)

    @property
    def is_cut(self) -> bool:
        """Whether any block is cut into branches."""
        return any(block.branch_bytes for stage in self.stages for block in stage.blocks)

    @property
    def is_split(self) -> bool:
        """Whether its stages are split into two streams."""
        return any(stage.coupling for stage in self.stages)

    @property
    def predicted_bytes(self) -> int:
        """The most that is held for backward at a time: what nothing drops, what was held so far, and what runs again."""
        held = self.saved_bytes
        stepped = sum(block.saved_bytes for stage in self.stages for block in stage.blocks if block.mode != "recompute")
        held -= stepped + sum(c.saved_bytes for c in self.checkpointed)
        peak = held
        for number, stage in enumerate((*self.stages, None)):
            for checkpoint in (c for c in self.checkpointed if c.after == number):
                held += checkpoint.input_bytes
                peak = max(peak, held + checkpoint.saved_bytes)
            if stage is not None:
                held += stage.held_bytes
                peak = max(peak, held + stage.largest_block_bytes)
        return peak

    @property
    def predicted_peak(self) -> int:
        """The most that a training step allocates at a time, by the plan's points; without them what is held at most."""
        return next((point.peak for point in self.points if point.name == THIS_PLAN), self.predicted_bytes)

    def frontier(self) -> Frontier:
        """Time against memory: what the fastest plan takes at each of some budgets, with plain and checkpointed beside.

        Raises:
            RevifyError: the plan was made by `convert`, or by a version that predicted nothing.
        """
        if not self.points:
            raise RevifyError(
                "this plan has no predictions: make one with revify.plan(model, example), without split streams and "
                "fitted predictors."
            )
        return Frontier(self.model, self.points)

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads it back."""
        return json.dumps({"format": FORMAT, **plain(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str, couplings: Iterable[Formula] = ()) -> Plan:
        """A plan from the text that `to_json` wrote. The text is data: nothing that it names is imported or called.

        Args:
            text: JSON.
            couplings: formulas of your own that the plan may name; those of `revify.couplings` need not be given.

        Raises:
            RevifyError: the text is no plan of this format, or holds a value that no plan has.
        """
        try:
            fields = parse(text)
            version = fields.pop("format")
        except (FaultError, KeyError, AttributeError, TypeError) as error:
            raise RevifyError(f"this text is no revify plan ({error}): expected what Plan.to_json() writes.") from error
        if type(version) is not int or version != FORMAT:
            raise RevifyError(
                f"this plan has format {shown(version)}; this revify reads format {FORMAT}: install a newer revify."
            )
        try:
            plan: Plan = read(cls, as_written_now(fields))
        except FaultError as error:
            raise RevifyError(f"this revify plan is damaged ({error}): write it again with Plan.to_json().") from error
        return replace(plan, couplings=tuple(couplings))

    def __str__(self) -> str:
        return draw_plan(self)
