"""Modules whose own forward adds are cut into steps: the same bits in both backwards, and the plain module afterwards."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import zoo
from asserts import Unchanged, assert_same, assert_same_gradients, converted, inputs_of, run
from torch import Tensor, nn

import revify
from revify import Plan
from revify.measuring.memory import count_memory


@pytest.mark.parametrize("kind", zoo.LOOPS)
def test_the_steps_are_the_additions(kind: type[zoo.Net]) -> None:
    model = kind()
    example = model.example()
    with Unchanged(model):
        plan = revify.plan(model, example)
    assert tuple(tuple(block.path for block in stage.blocks) for stage in plan.stages) == kind.STAGES
    assert tuple(len(stage.steps) for stage in plan.stages) == zoo.LOOPS[kind]
    assert all(stage.saved_bytes == sum(stage.blocks[0].branch_bytes) for stage in plan.stages)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("kind", zoo.LOOPS)
@pytest.mark.parametrize(("bits", "autocast"), [(0, None), (3, None), (4, torch.bfloat16)])
def test_gradients_are_those_of_autograd_bit_for_bit(
    kind: type[zoo.Net], bits: int, autocast: torch.dtype | None
) -> None:
    model = converted(kind, bits=bits)
    assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.parametrize("kind", zoo.LOOPS)
def test_the_way_back(kind: type[zoo.Net]) -> None:
    torch.manual_seed(0)
    plain = kind()
    model = revify.convert(plain, plain.example())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(run(revify.revert(model), inputs_of(plain)), run(plain, inputs_of(plain)))


@pytest.mark.parametrize("kind", zoo.LOOPS)
def test_a_copy_runs_its_own_branches(kind: type[zoo.Net]) -> None:
    model = converted(kind)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_gradients(other, inputs_of(other))


class ChangesTheLastValue(zoo.ResidualsInALoop):
    """What the last addition gives is changed in place before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.act(x).mean(1))


@pytest.mark.parametrize("step", ["coded", "recurrence"])
def test_a_change_in_place_after_the_last_addition(step: str) -> None:
    model = converted(ChangesTheLastValue, step=step)
    assert model.revify_plan.stages
    assert_same_gradients(model, inputs_of(model))


def test_batches_of_other_sizes() -> None:
    model = converted(zoo.LoopWithSideInputs)
    assert_same_gradients(model, [torch.randn(5, 5, 6)])


def test_a_module_that_is_put_in_later_is_called() -> None:
    model = converted(zoo.LoopInAContainer).eval()
    before = model(*inputs_of(model))
    model.blocks[0].layers[1][0] = nn.Identity()
    assert not torch.equal(model(*inputs_of(model)), before)


def test_an_argument_that_was_a_default() -> None:
    model = converted(zoo.LoopWithSideInputs)
    with pytest.raises(revify.StreamError, match=r"its argument scale is float, and was 0\.5"):
        model.blocks[0](torch.randn(2, 5, 6), mask=torch.ones(5, 1), scale=1.0)


@pytest.mark.parametrize("step", ["coded", "recurrence"])
def test_an_argument_that_was_a_tensor_and_is_missing(step: str) -> None:
    model = converted(zoo.LoopWithSideInputs, step=step)
    with pytest.raises(revify.StreamError, match=r"its argument mask is missing, and was a tensor"):
        model.blocks[0](torch.randn(2, 5, 6))


def test_a_plan_for_another_forward_is_refused() -> None:
    model = zoo.ResidualsInALoop()
    plan = revify.plan(model, model.example())
    model.blocks.append(zoo.branch())
    with pytest.raises(revify.RefusalError, match=r"the forward of the model into 4 additions, but it has 5"):
        revify.convert(model, plan=plan)


def test_memory_does_not_grow_with_the_loop() -> None:
    """As for blocks: a step more holds its residue only."""

    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.parts = nn.ModuleList(zoo.branch() for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x + part(x)
            return x

    peaks = []
    for depth in (6, 12):
        x = torch.randn(64, 50, 6)
        model = revify.convert(Deep(depth), x, bits=0)
        model(x).sum().backward()
        peaks.append(count_memory(lambda: model(x).sum(), torch.device("cpu")).peak)  # noqa: B023
    assert peaks[1] < 1.05 * peaks[0]
    gc.collect()


# What is not cut


class TwoAdditionsOnly(zoo.Net):
    """A block with attention and MLP, alone: it is a block, not a stage."""

    def __init__(self) -> None:
        super().__init__(zoo.Attention())


class LooksBack(zoo.ResidualsInALoop):
    """What a step computes within is used by a later one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = []
        for block in self.blocks:
            inner.append(block(x))
            x = x + inner[-1]
        return self.head((x + sum(inner)).mean(1))


class ChangesTheStream(zoo.ResidualsInALoop):
    """A value of the stream is changed in place behind the steps."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        first.mul_(2)
        return self.head(x.mean(1))


class AsksForItsMode(zoo.ResidualsInALoop):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + nn.functional.dropout(block(x), 0.5, self.training)
        return self.head(x.mean(1))


@pytest.mark.parametrize("kind", [TwoAdditionsOnly, LooksBack, ChangesTheStream, AsksForItsMode])
def test_what_is_not_cut(kind: type[zoo.Net]) -> None:
    """The calls of such a loop can still be steps, each of which codes what it is given."""
    torch.manual_seed(0)
    model = kind()
    assert revify.plan(model, model.example(), step="recurrence").stages == ()
    plan = revify.plan(model, model.example())
    assert all(stage.within is not None for stage in plan.stages)
    if plan.stages:
        assert_same_gradients(revify.convert(model, plan=plan), inputs_of(model))
