"""Calls with something between them are found as stages by themselves, exact, and no dearer than the plan says."""

from __future__ import annotations

import pytest
import torch
import zoo
from asserts import assert_same_gradients, inputs_of
from torch import Tensor, nn

import revify
from revify.measuring.memory import count_memory


@pytest.mark.parametrize("kind", zoo.APART)
@pytest.mark.parametrize(("bits", "autocast"), [(8, None), (4, torch.bfloat16)])
def test_they_are_found_and_exact(kind: type[zoo.Net], bits: int, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = kind()
    model = revify.convert(model, model.example(), bits=bits)
    stages = model.revify_plan.stages
    assert tuple(stage.length for stage in stages) == zoo.APART[kind]
    assert all(stage.within == "" for stage in stages)
    assert all(path.startswith("blocks") for stage in stages for path in stage.paths)
    assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.parametrize("kind", zoo.APART)
def test_a_recurrence_has_none(kind: type[zoo.Net]) -> None:
    model = kind()
    plan = revify.plan(model, model.example(), step="recurrence")
    assert all(stage.within is None for stage in plan.stages)


class NormsBesideTheBranches(nn.Module):
    """A loop that torch.fx cannot trace calls norms, then what is added; other modules have the stream's shape, too."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))])
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, part in self.layers:
            x = x + part(norm(x)) if len(x) else x
        return self.out(x)


def test_norms_and_branches_that_a_loop_calls_one_by_one() -> None:
    torch.manual_seed(0)
    net = NormsBesideTheBranches(6)
    x = torch.randn(32, 40, 6)
    model = revify.convert(net, x)
    assert_same_gradients(model, [x])
    stages = {path for stage in model.revify_plan.stages for path in stage.paths}
    assert "stem" not in stages
    assert {f"layers.{k}.0" for k in range(6)} <= stages
    model(x).sum().backward()
    peak = count_memory(lambda: model(x).sum(), torch.device("cpu")).peak
    net(x).sum().backward()
    assert peak < 0.5 * count_memory(lambda: net(x).sum(), torch.device("cpu")).peak


class OneBlockOnTwoShapes(zoo.Net):
    """A block is called on tokens, and on their mean: one of its calls is in no run with the others."""

    def __init__(self) -> None:
        super().__init__(*(zoo.Mlp() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.mean(1, keepdim=True)
        for block in self.blocks:
            x, y = block(x * 0.9) if len(x) else x, block(y * 0.9)
        return self.head((x + y).mean(1))


def test_no_module_is_in_two_stages() -> None:
    model = OneBlockOnTwoShapes()
    plan = revify.plan(model, model.example())
    paths = [path for stage in plan.stages for path in stage.paths]
    assert len(paths) == len(set(paths))
    if plan.stages:
        assert_same_gradients(revify.convert(model, plan=plan), inputs_of(model))


class SidesOfTheirOwn(zoo.Net):
    """Each half of a layer adds, but the second is also given what lies between, four times as wide: held, it is dear."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.wide, self.two = zoo.Mlp(), nn.Linear(6, 24), self.Second()

        class Second(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.down, self.drop = nn.Linear(24, 6), nn.Dropout(0.1)

            def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
                return x + self.drop(self.down(hidden.tanh()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.two(self.wide(x).sin(), x)

    def __init__(self) -> None:
        super().__init__(*(self.Layer() for _ in range(6)))


def test_other_arguments_count_as_held() -> None:
    model = SidesOfTheirOwn()
    plan = revify.plan(model, model.example())
    assert [block.path for block in plan.stages[0].blocks] == [f"blocks.{k}" for k in range(6)]
    by_name = revify.plan(model, model.example(), stages=["blocks.*.one", "blocks.*.two"])
    assert sum(block.side_bytes for block in by_name.stages[0].blocks) == 6 * 2 * 5 * 24 * 4
