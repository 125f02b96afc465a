"""A plan does not depend on the random numbers that were drawn while it was made."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import zoo
from asserts import Unchanged, assert_same, assert_same_gradients, both_ways, inputs_of, run
from torch import Tensor, nn

import revify


class SkipsBlocks(zoo.Net):
    """LayerDrop: the caller leaves whole blocks out."""

    how = "torch"

    def __init__(self) -> None:
        super().__init__(*(zoo.Mlp() for _ in range(6)))

    def _skipped(self) -> bool:
        if not self.training:
            return False
        if self.how == "torch":
            return bool(torch.rand([]) < 0.3)
        return (random.random() if self.how == "python" else np.random.uniform(0, 1)) < 0.05

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if not self._skipped():
                x = block(x)
        return self.head(x.mean(1))


class SkipsABranch(zoo.Mlp):
    """Stochastic depth of the block's own, for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(1).item() < 0.5 else super().forward(x)


class BlocksThatSkip(zoo.Net):
    def __init__(self) -> None:
        super().__init__(*(SkipsABranch() for _ in range(6)))


class SkipsOneBlock(SkipsBlocks):
    """Only one of the blocks is ever left out."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number != 3 or not self._skipped():
                x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("how", ["torch", "python", "numpy"])
@pytest.mark.parametrize("seed", range(4))
def test_a_recurrence_of_blocks_that_may_be_skipped_is_refused_with_the_reason(how: str, seed: int) -> None:
    model = SkipsBlocks()
    model.how = how
    x = torch.randn(2, 5, 6)
    seed_all(seed)
    with Unchanged(model):
        plan = revify.plan(model, x, step="recurrence")
    assert plan.stages == ()
    assert {r.path for r in plan.refusals} == {f"blocks.{number}" for number in range(6)}
    with pytest.raises(revify.RefusalError, match="not called in every forward pass: random numbers decide about it"):
        revify.convert(model, x, step="recurrence")


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("how", ["torch", "python", "numpy"])
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_coded_blocks_may_be_skipped(how: str, unit: str, autocast: torch.dtype | None) -> None:
    model = SkipsBlocks()
    model.how, x = how, [torch.randn(2, 5, 6)]
    seed_all(0)
    converted = revify.convert(model, x[0], unit=unit)
    assert [len(stage.blocks) for stage in converted.revify_plan.stages] == [6]
    trained = set[int]()
    for seed in range(20):
        outcomes = []
        for plain in (True, False):
            seed_all(seed)
            outcomes.append(run(converted, x, seed=seed, plain=plain, autocast=autocast))
        assert_same(outcomes[1], outcomes[0])
        trained.add(len(outcomes[0]))
    assert len(trained) > 1  # other blocks were skipped


def test_a_recurrence_of_what_is_called_in_every_pass_is_still_converted() -> None:
    plans = set()
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = SkipsOneBlock(), torch.randn(2, 5, 6)
        converted = revify.convert(model, x, step="recurrence")
        plans.add(tuple(stage.steps for stage in converted.revify_plan.stages))
        for number in range(4):
            assert_same(run(converted, [x], seed=number), run(converted, [x], seed=number, plain=True))
    assert plans == {(("blocks.0", "blocks.1", "blocks.2"), ("blocks.4", "blocks.5"))}


class StemThatAsksForAGradient(zoo.PreNormBlocks):
    """As Wav2Vec2's: its input gets a gradient in forward, which only a tensor without a graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = AsksForAGradient()


class AsksForAGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        x.requires_grad = True
        return self.down(self.up(x).relu().sigmoid().tanh()).squeeze(1)


def test_the_models_inputs_are_planned_without_gradients() -> None:
    model, x = StemThatAsksForAGradient(), torch.randn(2, 5, 6)
    converted = revify.convert(model, x)
    assert any("stem" in checkpoint.path for checkpoint in converted.revify_plan.checkpointed)
    both_ways(converted, lambda: converted(x).sum().backward())


def test_blocks_that_draw_within_themselves_are_steps_whatever_was_drawn() -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        model = BlocksThatSkip()
        converted = revify.convert(model, model.example())
        assert [len(stage.steps) for stage in converted.revify_plan.stages] == [6]
        x = inputs_of(model)
        for number in range(3):
            assert_same(run(converted, x, seed=number), run(converted, x, seed=number, plain=True))


@pytest.mark.parametrize("generator", ["torch", "python", "numpy"])
def test_planning_leaves_every_generator_as_it_was(generator: str) -> None:
    model = SkipsBlocks()
    model.how = generator
    x = torch.randn(2, 5, 6)
    draw = {"torch": lambda: float(torch.rand(())), "python": random.random, "numpy": lambda: float(np.random.rand())}
    draw_one = draw[generator]
    seeds = {"torch": torch.manual_seed, "python": random.seed, "numpy": np.random.seed}
    seeds[generator](5)
    expected = draw_one()
    seeds[generator](5)
    revify.plan(model, x)
    assert draw_one() == expected


def test_ordinary_dropout_needs_no_further_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import revify.reading.draws as draws

    calls = []
    observe = draws.observe
    monkeypatch.setattr(draws, "observe", lambda *given: calls.append(1) or observe(*given))
    model = zoo.DropoutAndDropPath()
    revify.plan(model, model.example())
    assert len(calls) == 1


def test_a_branch_that_is_left_out_by_a_module_of_its_own() -> None:
    """DropPath draws for each sample: nothing is skipped."""
    model = zoo.DropoutAndDropPath()
    assert_same_gradients(revify.convert(model, model.example()), inputs_of(model))
