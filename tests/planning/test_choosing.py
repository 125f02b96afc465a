"""Of runs that overlap, those are chosen with the least predicted peak of the whole plan."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import zoo
from asserts import assert_same_gradients
from test_stages import runs_of
from torch import nn

import revify
from revify.planning.choosing import Run, parts_of
from revify.plans import Plan


def groups(sizes: tuple[tuple[int, ...], ...]) -> zoo.BlocksInGroups:
    """Groups of blocks whose inner widths are given; a single number is a block that lies between the groups."""

    def block(width: int) -> nn.Module:
        mlp = zoo.Mlp()
        mlp.up, mlp.down = nn.Linear(6, width), nn.Linear(width, 6)
        return mlp

    return zoo.BlocksInGroups(
        *(block(own[0]) if len(own) == 1 else zoo.BlocksInGroups.Group(*map(block, own)) for own in sizes)
    )


def subsets(parts: Sequence[Run]) -> Iterator[tuple[Run, ...]]:
    """Every set of parts of which no two overlap."""
    if not parts:
        yield ()
        return
    first, *rest = parts
    for others in subsets(rest):
        yield others
        if not any(first.overlaps(other) for other in others):
            yield (first, *others)


def peak_with(plan: Plan, stages: tuple[Run, ...]) -> int:
    """What the plan would hold at most with other stages."""
    made = []
    for stage in sorted(stages, key=lambda stage: stage.start):
        blocks = tuple(replace(plan.stages[0].blocks[0], saved_bytes=b.call.saved_bytes) for b in stage.blocks)
        made.append(replace(plan.stages[0], blocks=blocks))  # all streams are alike
    return replace(plan, stages=tuple(made)).predicted_bytes


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_of_stages_has_a_lower_peak(seed: int) -> None:
    """Against all sets of parts of runs, in nets of groups of blocks that are small and large by chance."""
    chance = random.Random(seed)
    sizes = tuple(
        tuple(chance.choice((3, 12, 48)) for _ in range(chance.choice((1, 2, 3, 4))))
        for _ in range(chance.choice((3, 4)))
    )
    model = groups(sizes)
    bits = chance.choice((0, 4))
    plan = revify.plan(model, model.example(), bits=bits, transitions="keep")
    assert plan.predicted_bytes == min(peak_with(plan, stages) for stages in subsets(parts_of(runs_of(model))))


def test_blocks_in_groups_are_three_stages_and_not_one_of_groups() -> None:
    """Groups saved singly by their benefit would be one run, whose steps save four blocks each."""
    model = groups(((12,) * 4,) * 3)
    assert max(run.benefit for run in runs_of(model)) == max(
        run.benefit
        for run in runs_of(model)
        if isinstance(model.get_submodule(run.blocks[0].call.path), zoo.BlocksInGroups.Group)
    )
    converted = revify.convert(model, model.example())
    assert [len(stage.blocks) for stage in converted.revify_plan.stages] == [4, 4, 4]
    torch.manual_seed(0)
    assert_same_gradients(converted, model.example())


def test_a_run_is_parted_around_a_block_with_a_run_inside() -> None:
    """Two small blocks, a group of eight large ones, two small blocks: three stages."""
    model = groups(((12,), (12,), (48,) * 8, (12,), (12,)))
    plan = revify.plan(model, model.example(), bits=0)
    assert [[block.path for block in stage.blocks] for stage in plan.stages] == [
        ["blocks.0", "blocks.1"],
        [f"blocks.2.body.{i}" for i in range(8)],
        ["blocks.3", "blocks.4"],
    ]
