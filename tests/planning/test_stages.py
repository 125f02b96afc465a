"""Blocks become stages: maximal runs on one stream, of the grain that saves most."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn

import revify
from revify.planning.blocks import find_blocks
from revify.planning.stages import Stage, find_runs
from revify.reading.observing import observe
from revify.reading.recording import follow


def runs_of(model: zoo.Net) -> tuple[Stage, ...]:
    example = model.example()
    graph = follow(model, example)
    return find_runs(find_blocks(observe(model, example), graph, dict(model.named_modules())), graph)


def paths_of(model: zoo.Net) -> tuple[tuple[str, ...], ...]:
    plan = revify.plan(model, model.example(), bits=0)
    return tuple(tuple(block.path for block in stage.blocks) for stage in plan.stages)


@pytest.mark.parametrize("kind", [*zoo.CONVERTIBLE, *zoo.REFUSED])
def test_zoo(kind: type[zoo.Net]) -> None:
    assert paths_of(kind()) == kind.STAGES


class Mixed(zoo.Net):
    """Blocks of a given kind in a given order; None stands for something that breaks the stream."""

    def __init__(self, *blocks: nn.Module | None) -> None:
        super().__init__(*(block or nn.Linear(6, 6) for block in blocks))


def test_what_breaks_the_stream_begins_another_stage() -> None:
    model = Mixed(zoo.Mlp(), zoo.Mlp(), None, zoo.Mlp(), zoo.Mlp(), zoo.Mlp())
    assert paths_of(model) == (("blocks.0", "blocks.1"), ("blocks.3", "blocks.4", "blocks.5"))


def test_blocks_of_several_classes_share_a_stage() -> None:
    assert paths_of(Mixed(zoo.Mlp(), zoo.Attention(), zoo.Mlp())) == (("blocks.0", "blocks.1", "blocks.2"),)


def test_operation_between_two_blocks_breaks_the_stream() -> None:
    class Scaled(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            for number, block in enumerate(self.blocks):
                x = block(x * 2) if number == 2 else block(x)
            return x

    assert paths_of(Scaled(*(zoo.Mlp() for _ in range(5)))) == (
        ("blocks.0", "blocks.1"),
        ("blocks.2", "blocks.3", "blocks.4"),
    )


def test_change_in_place_between_two_blocks_breaks_the_stream() -> None:
    class Changed(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            for number, block in enumerate(self.blocks):
                x = block(x.add_(1)) if number == 2 else block(x)
            return x

    assert paths_of(Changed(*(zoo.Mlp() for _ in range(4)))) == (("blocks.0", "blocks.1"), ("blocks.2", "blocks.3"))


def test_a_look_at_the_stream_does_not_break_it() -> None:
    assert paths_of(zoo.AuxiliaryLoss()) == zoo.AuxiliaryLoss.STAGES


def test_of_containers_and_their_blocks_the_blocks_are_taken() -> None:
    """Three containers of two blocks each are residual blocks themselves; the finer stage holds less at a time."""
    groups = [nn.Sequential(zoo.Mlp(), zoo.Mlp()) for _ in range(3)]
    model = Mixed(*groups)
    assert paths_of(model) == (tuple(f"blocks.{i}.{j}" for i in range(3) for j in range(2)),)


def test_no_module_is_in_two_stages() -> None:
    """Each block contains a block that adds to its own input."""
    model = Mixed(*(zoo.Attention() for _ in range(3)))
    paths = [path for stage in paths_of(model) for path in stage]
    assert len(paths) == len(set(paths))
    assert not any(a.startswith(b + ".") for a in paths for b in paths)


def test_parallel_blocks_on_one_value() -> None:
    """Two blocks take the same value: the stream goes on in one of them, and the other is left alone."""

    class Forked(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            return self.blocks[3](self.blocks[2](x)) + self.blocks[1](x)

    found = paths_of(Forked(*(zoo.Mlp() for _ in range(4))))
    assert len(found) == 1
    assert found[0][0] == "blocks.0"
    assert len(found[0]) == len(set(found[0]))


def test_blocks_of_other_types_do_not_join() -> None:
    class Casts(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[1](self.blocks[0](x))
            x = x.double()
            return self.blocks[3](self.blocks[2](x))

    model = Casts(*(zoo.Mlp() for _ in range(4)))
    model.blocks[2:].double()
    assert paths_of(model) == (("blocks.0", "blocks.1"), ("blocks.2", "blocks.3"))
    assert [run.stream_bytes for run in runs_of(model)] == [2 * 5 * 6 * 4, 2 * 5 * 6 * 8]


def test_bytes_of_a_stage() -> None:
    (stage,) = runs_of(zoo.PreNormBlocks())
    each = [block.call.saved_bytes for block in stage.blocks]
    assert stage.saved_bytes == sum(each)
    assert stage.largest_block_bytes == max(each)
    assert stage.benefit == sum(each) - max(each) - 2 * stage.stream_bytes


def test_half_precision_streams_are_held_in_float32() -> None:
    model = zoo.PreNormBlocks().bfloat16()
    plan = revify.plan(model, torch.zeros(zoo.TOKENS, dtype=torch.bfloat16))
    assert plan.stages[0].dtype == "bfloat16"
    assert plan.stages[0].stream_bytes == 2 * 5 * 6 * 4
