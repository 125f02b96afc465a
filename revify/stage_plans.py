"""The stages of a plan: what becomes of each block, and what that holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import Annotated

import torch

from revify.plan_faults import block_faults, stage_faults
from revify.reading.roles import Shortcut
from revify.records import Among, Range
from revify.runtime.codes import code_bytes
from revify.runtime.grid import Grid
from revify.words import CALIBRATED, FIXED, FORMERLY_BALANCED, MAX_BITS, MAX_GRID, MODES, SIGNS, STEPS

CUT, LIFTED, WHOLE = "cut", "lifted", "lifted whole"

NO_PREDICTOR = "–"  # of a stage that is split into two streams

# What the fields of a plan hold, for its readers and its reader: revify.records
Bytes = Annotated[int, Range(0, 2**60)]
Bits = Annotated[int, Range(0, MAX_BITS)]
Half = Annotated[int, Range(0, 1)]
Argument = Annotated[int, Range(0, 255)] | str  # a position or a keyword
Size = Annotated[int, Range(0, 2**24)]
Dtype = Annotated[str, Among(("float16", "bfloat16", "float32", "float64", "complex64", "complex128"))]


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
    half: Half


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """One residual branch of a block whose stage is split into two streams.

    Args:
        how: "cut" to half its input and output channels; "lifted", at full width with zeros for the other half;
            "lifted whole", the same where the branches of the block cannot be told apart: T(x) − x.
        cuts: which layers are cut.
        saved_bytes: what autograd saves within it.
    """

    how: Annotated[str, Among((CUT, LIFTED, WHOLE))]
    cuts: tuple[Cut, ...]
    saved_bytes: Bytes


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of a stage.

    Args:
        path: of the module.
        kind: its class name.
        stream: which of its arguments is the stream, a position or a keyword.
        shortcut: identity, scaled, post-activation, post-norm; or none, where the block does not add to its input.
        saved_bytes: what autograd saves within it.
        branch_bytes: what autograd saves in each of its residual branches, if each of them is a step; else empty.
        inputs: which of its arguments are tensors, if its branches are run one by one.
        result: which of several results is the stream, None where the block returns one tensor.
        split_branches: its residual branches, if the stage runs on two streams of half the channels; else empty.
        bits: residue bits per element of each of its steps, None where they are those of the stage.
        kept_bytes: what it keeps until the backward by itself: attributes, and custom Functions that save nothing the usual
            way.
        run: where its own forward adds, in a loop over other modules, which run of its additions; None where the block as a
            whole is a step, or its branches are.
        inner: the paths of the modules that the steps of such a run call.
        calls: how often it is called in one forward pass.
        side_bytes: of its other arguments, which live until its backward, where no block before it was given them.
        mode: "keep" leaves it to ordinary autograd, "recompute" runs it again from an input that is held, as part of what the
            plan checkpoints; None makes it a step of its stage. Between blocks that are no steps, a stage begins anew.
    """

    path: str
    kind: str
    stream: Argument
    shortcut: Annotated[str, Among(tuple(Shortcut))]
    saved_bytes: Bytes
    branch_bytes: tuple[Bytes, ...] = ()
    inputs: tuple[Argument, ...] = ()
    result: Annotated[int, Range(0, 255)] | None = None
    split_branches: tuple[BranchPlan, ...] = ()
    bits: Bits | None = None
    kept_bytes: Bytes = 0
    run: Annotated[int, Range(0, 2**16)] | None = None
    inner: tuple[str, ...] = ()
    calls: Annotated[int, Range(1, 2**16)] = 1
    side_bytes: Bytes = 0
    mode: Annotated[str, Among(MODES)] | None = None

    def faults(self) -> Iterator[str]:
        """What does not go together, in sentences."""
        return block_faults(self)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the modules whose activations it does not keep."""
        return (self.path,) if self.run is None else self.inner

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of its steps."""
        if self.run is not None:
            where = f"{self.path or 'the forward of the model'}, run {self.run}"
            return tuple(f"{where}, addition {number}" for number in range(len(self.branch_bytes)))
        count = max(len(self.split_branches), len(self.branch_bytes))
        return tuple(f"{self.path}, branch {number}" for number in range(count)) if count > 1 else (self.path,)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One reversible stage.

    Args:
        blocks: in the order of their calls; the first is run as it is, the others are coupled.
        shape: of the stream in the example, batch first.
        dtype: of the stream in the plain model.
        stream_bytes: of one stream value.
        bits: per element and step, of the blocks that say nothing else: 2…8 of a code, 0…8 of a residue.
        predictor: of the previous stream value; coded steps have none.
        sign: of γ: "positive"; "balanced", + − − + over the steps; "random" in training, and plain blocks in eval mode.
        axis: which axis of the stream is the channels', None where that could not be found.
        rank: of a low-rank predictor, else 0.
        deviation: relative error of the model's output on the calibration data with the stages up to this one
            converted, None where it was not measured.
        coupling: where the stage is split into two streams, the name of their coupling, else "".
        grid: resolution of its grid, None where it is that of the plan.
        pattern: of balanced signs: + or - for each coupled step, begun anew where it is shorter than the stage.
        step: "coded", updates coded in `bits` bits, or "recurrence".
        copied: whether its output is handed on as a copy, since the model changes it in place.
        within: where something lies between its blocks, so that each codes what it is given: the path of the module in
            whose calls they form a pass; None where each block is given what the one before returned.
    """

    blocks: tuple[BlockPlan, ...]
    shape: tuple[Size, ...]
    dtype: Dtype
    stream_bytes: Bytes
    bits: Bits
    predictor: Annotated[str, Among((*FIXED, *CALIBRATED, NO_PREDICTOR))]
    sign: Annotated[str, Among(SIGNS)] = "positive"
    axis: Annotated[int, Range(0, 63)] | None = None
    rank: Annotated[int, Range(0, 2**20)] = 0
    deviation: Annotated[float, Range(0, float("inf"))] | None = None
    coupling: str = ""
    grid: Annotated[int, Range(0, MAX_GRID)] | None = None
    pattern: str = FORMERLY_BALANCED
    step: Annotated[str, Among(STEPS)] = "recurrence"
    copied: bool = False
    within: str | None = None

    @property
    def element_bytes(self) -> int:
        """Of one element of a stream value."""
        return Grid(self.grid or 0).held_in(getattr(torch, self.dtype)).itemsize

    def faults(self) -> Iterator[str]:
        """What does not go together, in sentences."""
        return stage_faults(self)

    @property
    def saved_bytes(self) -> int:
        """What plain autograd saves in the stage."""
        return sum(block.saved_bytes for block in self.blocks)

    @property
    def runs(self) -> tuple[tuple[BlockPlan, ...], ...]:
        """Its blocks that are steps, in runs with no other block between them."""
        return tuple(tuple(run) for stepped, run in groupby(self.blocks, lambda block: block.mode is None) if stepped)

    @property
    def held_bytes(self) -> int:
        """What it holds for backward: stream values, the bits of steps, other arguments, what blocks keep by themselves."""
        kept = sum(block.kept_bytes + block.side_bytes for run in self.runs for block in run)
        if self.coupling:
            return self.stream_bytes + kept
        if self.step == "coded":
            codes = sum(len(block.steps) * block.calls for run in self.runs for block in run) - len(self.runs)
            value = math.prod(self.shape) * getattr(torch, self.dtype).itemsize
            kept += sum(block.saved_bytes for block in self.blocks if block.mode == "keep")
            return value * len(self.runs) + code_bytes(self.shape, self.bits) * codes + kept
        elements = self.stream_bytes // self.element_bytes
        values = (3 if self.copied else 2) * self.stream_bytes
        return values + kept + sum(elements * bits // 8 for bits in self.step_bits[1:])

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
    def length(self) -> int:
        """How many steps one forward pass takes in it."""
        return sum(len(block.steps) * block.calls for block in self.blocks)

    @property
    def largest_block_bytes(self) -> int:
        """What one step saves at most while it runs again."""
        if self.coupling:
            return max(branch.saved_bytes for block in self.blocks for branch in block.split_branches)
        stepped = (block for run in self.runs for block in run)
        return max((max(block.branch_bytes, default=block.saved_bytes // block.calls) for block in stepped), default=0)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the modules whose activations it does not keep."""
        return tuple(path for block in self.blocks for path in block.paths)

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of its steps: the blocks' paths, or more where blocks are cut into branches."""
        return tuple(name for block in self.blocks for name in block.steps)
