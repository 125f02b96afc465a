"""The plan: what will be done to a model, as a frozen record that prints as a table and goes through JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from revify.errors import RevifyError
from revify.tables import draw_plan

FORMAT = 1

CUT, LIFTED, WHOLE = "cut", "lifted", "lifted whole"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A part of the model that is left as it is.

    Args:
        path: of the module.
        reason: what was found.
        remedy: what to do instead.
    """

    path: str
    reason: str
    remedy: str


class Side(StrEnum):
    """Where a layer is cut."""

    INPUT = "input"
    OUTPUT = "output"
    CHANNELS = "channels"
    VALUE = "value"  # a parameter that an operation uses directly


@dataclass(frozen=True, slots=True)
class Cut:
    """One layer, or parameter, that is cut to one half of the stream's channels.

    Args:
        path: of the layer or parameter, within its block.
        side: which of its axes.
        half: 0 or 1.
    """

    path: str
    side: Side
    half: int


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """One residual branch of a block whose stage is split into two streams.

    Args:
        how: "cut" to half its input and output channels; "lifted", at full width with zeros for the other half;
            "lifted whole", the same where the branches of the block cannot be told apart: T(x) − x.
        cuts: which layers are cut.
        saved_bytes: what autograd saves within it.
    """

    how: str
    cuts: tuple[Cut, ...]
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of a stage.

    Args:
        path: of the module.
        kind: its class name.
        stream: which of its arguments is the stream, a position or a keyword.
        shortcut: identity, scaled, post-activation or post-norm.
        saved_bytes: what autograd saves within it.
        branches: what autograd saves in each of the parts into which it is cut; empty where it is one step.
        inputs: where it is cut, which of its arguments are tensors.
        result: which of several results is the stream, None where the block returns one tensor.
        halves: where the stage is split into two streams, its branches.
        bits: residue bits per element of each of its steps, None where they are those of the stage.
    """

    path: str
    kind: str
    stream: int | str
    shortcut: str
    saved_bytes: int
    branches: tuple[int, ...] = ()
    inputs: tuple[int | str, ...] = ()
    result: int | None = None
    halves: tuple[BranchPlan, ...] = ()
    bits: int | None = None

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of its steps."""
        if len(self.halves) > 1:
            return tuple(f"{self.path}, branch {number}" for number in range(len(self.halves)))
        if not self.branches:
            return (self.path,)
        return tuple(f"{self.path}, branch {number}" for number in range(len(self.branches)))


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One reversible stage.

    Args:
        blocks: in the order of their calls; the first is run as it is, the others are coupled.
        shape: of the stream in the example, batch first.
        dtype: of the stream in the plain model.
        stream_bytes: of one stream value.
        bits: residue bits per element and step, 0…8, of the blocks that say nothing else.
        predictor: of the previous stream value.
        sign: of γ: "positive"; "balanced", + − − + over the steps; "random" in training, and plain blocks in eval mode.
        axis: which axis of the stream is the channels', None where that could not be found.
        rank: of a low-rank predictor, else 0.
        deviation: relative error of the model's output on the calibration data with the stages up to this one
            converted, None where it was not measured.
        coupling: where the stage is split into two streams, the name of their coupling, else "".
    """

    blocks: tuple[BlockPlan, ...]
    shape: tuple[int, ...]
    dtype: str
    stream_bytes: int
    bits: int
    predictor: str
    sign: str = "positive"
    axis: int | None = None
    rank: int = 0
    deviation: float | None = None
    coupling: str = ""

    @property
    def saved_bytes(self) -> int:
        """What plain autograd saves in the stage."""
        return sum(block.saved_bytes for block in self.blocks)

    @property
    def held_bytes(self) -> int:
        """What the reversible stage holds: two stream values and the packed residues."""
        if self.coupling:
            return self.stream_bytes
        elements = self.stream_bytes // (8 if self.dtype == "float64" else 4)
        return 2 * self.stream_bytes + sum(elements * bits // 8 for bits in self.step_bits[1:])

    def with_bits(self, bits: int) -> StagePlan:
        """The same with these bits in every step."""
        return replace(self, bits=bits, blocks=tuple(replace(block, bits=None) for block in self.blocks))

    @property
    def step_bits(self) -> tuple[int, ...]:
        """The residue bits of its steps; the first step needs none."""
        own = [self.bits if block.bits is None else block.bits for block in self.blocks]
        return tuple(bits for block, bits in zip(self.blocks, own, strict=True) for _ in block.steps)

    @property
    def bits_text(self) -> str:
        """The bits as text: one number, or the mean over the coupled steps with the range."""
        coupled = self.step_bits[1:]
        if len(set(coupled)) == 1:
            return str(coupled[0])
        return f"{sum(coupled) / len(coupled):.2g} ({min(coupled)}–{max(coupled)})"

    @property
    def largest_block_bytes(self) -> int:
        """What one step saves at most while it runs again."""
        if self.coupling:
            return max(branch.saved_bytes for block in self.blocks for branch in block.halves)
        return max(max(block.branches, default=block.saved_bytes) for block in self.blocks)

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of its steps: the blocks' paths, or more where blocks are cut into branches."""
        return tuple(name for block in self.blocks for name in block.steps)


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
    saved_bytes: int
    input_bytes: int
    joined: tuple[str, ...] = ()
    after: int = 0

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
        grid: resolution q of the grid, in bits behind the binary point.
        transitions: "keep" or "checkpoint".
        stages: what becomes reversible.
        checkpointed: what lies outside of the stages and is checkpointed.
        refusals: what looks like a block and is left as it is.
        saved_bytes: what plain autograd saves for the example.
        traced: how the structure was found: "whole" or, where the whole model cannot be traced, why not.
    """

    model: str
    architecture: str | None
    example: tuple[tuple[int, ...], ...]
    grid: int
    transitions: str
    stages: tuple[StagePlan, ...]
    checkpointed: tuple[CheckpointPlan, ...]
    refusals: tuple[Refusal, ...]
    saved_bytes: int
    traced: str

    @property
    def stage_share(self) -> float:
        """The share of the saved bytes that lies inside the stages, 0…1."""
        return sum(stage.saved_bytes for stage in self.stages) / max(self.saved_bytes, 1)

    @property
    def is_cut(self) -> bool:
        """Whether any block is cut into branches."""
        return any(block.branches for stage in self.stages for block in stage.blocks)

    @property
    def is_split(self) -> bool:
        """Whether its stages are split into two streams."""
        return any(stage.coupling for stage in self.stages)

    @property
    def predicted_bytes(self) -> int:
        """The most that is held for backward at a time: what nothing drops, what was held so far, and what runs again."""
        held = self.saved_bytes
        held -= sum(stage.saved_bytes for stage in self.stages) + sum(c.saved_bytes for c in self.checkpointed)
        peak = held
        for number, stage in enumerate((*self.stages, None)):
            for checkpoint in (c for c in self.checkpointed if c.after == number):
                held += checkpoint.input_bytes
                peak = max(peak, held + checkpoint.saved_bytes)
            if stage is not None:
                held += stage.held_bytes
                peak = max(peak, held + stage.largest_block_bytes)
        return peak

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads it back."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from the text that `to_json` wrote.

        Raises:
            RevifyError: the text is no plan of this format.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RevifyError(f"this text is no revify plan ({error}): expected what Plan.to_json() writes.") from error
        if version != FORMAT:
            raise RevifyError(
                f"this plan has format {version}; this revify reads format {FORMAT}: install a newer revify."
            )
        try:
            return cls(**_restored(fields))
        except (KeyError, TypeError) as error:
            raise RevifyError(f"this revify plan is damaged ({error}): write it again with Plan.to_json().") from error

    def __str__(self) -> str:
        return draw_plan(self)


def _restored(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        **fields,
        "example": tuple(tuple(shape) for shape in fields["example"]),
        "stages": tuple(
            StagePlan(
                **{
                    **_with_sign(stage),
                    "shape": tuple(stage["shape"]),
                    "blocks": tuple(_restored_block(block) for block in stage["blocks"]),
                }
            )
            for stage in fields["stages"]
        ),
        "checkpointed": tuple(CheckpointPlan(**_tuples(c)) for c in fields["checkpointed"]),
        "refusals": tuple(Refusal(**r) for r in fields["refusals"]),
    }


def _with_sign(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage as written before there was more than one sign of γ, as it is written now."""
    stage = dict(stage)
    if "random_sign" in stage:
        stage["sign"] = "random" if stage.pop("random_sign") else "positive"
    return stage


def _restored_block(fields: dict[str, Any]) -> BlockPlan:
    halves = tuple(
        BranchPlan(
            branch["how"],
            tuple(Cut(cut["path"], Side(cut["side"]), cut["half"]) for cut in branch["cuts"]),
            branch["saved_bytes"],
        )
        for branch in fields.get("halves", ())
    )
    return BlockPlan(**{**_tuples(fields), "halves": halves})


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
