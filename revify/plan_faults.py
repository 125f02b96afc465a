"""Plan → what in it does not go together, as sentences: what no single field can say about itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from revify.words import CALIBRATED

if TYPE_CHECKING:
    from revify.plans import Plan
    from revify.stage_plans import BlockPlan, StagePlan

_PATTERN = re.compile(r"[+-]{1,4096}")
_COUPLING = re.compile(r"[\w.<>]+(:[\w.<>]+)?")


def block_faults(block: BlockPlan) -> Iterator[str]:
    """Faults of one block."""
    if block.branch_bytes and block.split_branches:
        yield "a block is cut into branches, or split into branches of half the channels, not both"
    if block.run is not None and not (block.branch_bytes and block.inner):
        yield "a run of additions has branches, and names the modules that they call"
    if len(block.branch_bytes) == 1:
        yield "a block with one branch is one step, so the bytes of its branches are not listed"


def stage_faults(stage: StagePlan) -> Iterator[str]:
    """Faults of one stage."""
    if stage.length < 2:
        yield "a stage has two steps at least"
    split = bool(stage.coupling)
    if split and not _COUPLING.fullmatch(stage.coupling):
        yield "its coupling is no name, and no module:name"
    if any(bool(block.split_branches) is not split for block in stage.blocks):
        yield "every block of a stage has split branches if the stage has a coupling, and none if it has not"
    if split is not (stage.predictor == "–"):
        yield 'a stage has a predictor, or a coupling and the predictor "–"'
    if stage.axis is not None and stage.axis >= len(stage.shape):
        yield f"its axis is {stage.axis}, but its shape has {len(stage.shape)} axes"
    elif stage.axis is None and (split or stage.predictor in CALIBRATED):
        yield "its channel axis is missing"
    elif stage.axis is not None and stage.predictor == "lowrank" and not 1 <= stage.rank <= stage.shape[stage.axis]:
        yield f"its rank is {stage.rank}, but it has {stage.shape[stage.axis]} channels"
    if not _PATTERN.fullmatch(stage.pattern):
        yield "its pattern of signs is not made of + and -"
    if stage.step == "coded":
        if split or stage.predictor != "identity":
            yield "coded steps have no coupling and no predictor"
        if any(not 2 <= bits <= 8 for bits in stage.step_bits) or any(block.bits is not None for block in stage.blocks):
            yield "the codes of a stage have 2 to 8 bits, the same in every step"
    elif stage.within is not None or any(block.calls > 1 for block in stage.blocks):
        yield "only coded steps may have something between them, or be one module that is called several times"
    if stage.within is None and any(block.calls > 1 for block in stage.blocks):
        yield "where a block is called several times, the stage names the module in whose calls its blocks form a pass"
    if stage.within is not None and any(block.steps != (block.path,) for block in stage.blocks):
        yield "blocks with something between them are steps as a whole"
    if any(block.mode is not None for block in stage.blocks) and (stage.step != "coded" or stage.within is not None):
        yield "only blocks of coded stages, with nothing between them, are kept, or run again, one by one"
    if stage.predictor != "lowrank" and stage.rank:
        yield "only a low-rank predictor has a rank"


def plan_faults(plan: Plan) -> Iterator[str]:
    """Faults of the whole plan."""
    blocks = Counter((block.path, block.run) for stage in plan.stages for block in stage.blocks)
    yield from (f"the block {path!r} is in it {count} times" for (path, _), count in blocks.items() if count > 1)
    if plan.guard == "shapes" and any(stage.step != "coded" for stage in plan.stages):
        yield "only coded steps may be compared in shapes"
    stepped = {path for stage in plan.stages for block in stage.blocks if block.mode is None for path in block.paths}
    again = {path for checkpoint in plan.checkpointed for path in checkpoint.paths}
    for checkpoint in plan.checkpointed:
        if checkpoint.after > len(plan.stages):
            yield f"{checkpoint.path!r} is checkpointed after stage {checkpoint.after}, but there are {len(plan.stages)}"
    for path in sorted(again):
        if not stepped.isdisjoint(_with_parents(path)):
            yield f"{path!r} is checkpointed and a block of a stage, or lies in one"
        if not again.isdisjoint(_with_parents(path)[:-1]):
            yield f"{path!r} is checkpointed, and so is a module that it lies in"
    for path in sorted(stepped):
        if not again.isdisjoint(_with_parents(path)):
            yield f"{path!r} is a block of a stage and lies in a module that is checkpointed"
    for block in (block for stage in plan.stages for block in stage.blocks if block.mode == "recompute"):
        if any(again.isdisjoint(_with_parents(path)) for path in block.paths):
            yield f"{block.path!r} is to run again, but is in nothing that is checkpointed"


def _with_parents(path: str) -> list[str]:
    """A path, and before it those of the modules that it lies in, but for the root."""
    parts = path.split(".")
    return [".".join(parts[: number + 1]) for number in range(len(parts))]
