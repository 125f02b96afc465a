"""Every kind of shortcut is found, and what is none is refused with the reason that is true of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.fx import Tracer

import revify
from revify.planning.blocks import find_blocks
from revify.reading.observing import observe
from revify.reading.recording import follow
from revify.reading.roles import Shortcut, find_shortcut


def blocks_of(model: zoo.Net) -> dict[str, Shortcut]:
    example = model.example()
    found = find_blocks(observe(model, example), follow(model, example), dict(model.named_modules()))
    return {block.call.path: block.shortcut for block in found}


@pytest.mark.parametrize("kind", zoo.CONVERTIBLE)
def test_every_block_of_the_zoo_is_found(kind: type[zoo.Net]) -> None:
    found = blocks_of(kind())
    for stage in kind.STAGES:
        assert set(stage) <= found.keys()


@pytest.mark.parametrize(
    ("kind", "shortcut"),
    [
        (zoo.PreNormBlocks, Shortcut.IDENTITY),
        (zoo.TwoAdditionsInABlock, Shortcut.IDENTITY),
        (zoo.InPlaceActivations, Shortcut.IDENTITY),
        (zoo.ChangesLayout, Shortcut.IDENTITY),
        (zoo.SideInputsWithGradient, Shortcut.IDENTITY),
        (zoo.ScaledSkip, Shortcut.SCALED),
        (zoo.PostActivationBatchNorm, Shortcut.POST_ACTIVATION),
        (zoo.PostNorm, Shortcut.POST_NORM),
    ],
)
def test_what_lies_on_the_shortcut(kind: type[zoo.Net], shortcut: Shortcut) -> None:
    assert blocks_of(kind())["blocks.0"] == shortcut


class Body(nn.Module):
    """A function of x with layers to call."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.act, self.drop = nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Dropout()
        self.scale = nn.Parameter(torch.ones(6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def shortcut_in(function: Callable[[nn.Module, Tensor], Tensor]) -> Shortcut | None:
    body = Body(function)
    nodes = list(Tracer().trace(body).nodes)
    return find_shortcut(nodes[0], nodes[-1].args[0], dict(body.named_modules()))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x + m.f(x), Shortcut.IDENTITY),
        (lambda m, x: m.f(x) + x, Shortcut.IDENTITY),
        (lambda m, x: torch.add(m.f(x), x), Shortcut.IDENTITY),
        (lambda m, x: m.f(x).add_(x), Shortcut.IDENTITY),
        (lambda m, x: (y := x + m.f(x)) + m.g(y), Shortcut.IDENTITY),
        (lambda m, x: x + m.f(x) + m.g(x), Shortcut.IDENTITY),
        (lambda m, x: x.flatten(1).unflatten(1, (5, 6)) + m.f(x), Shortcut.IDENTITY),
        (lambda m, x: x.transpose(1, 2).transpose(1, 2) + m.f(x), Shortcut.IDENTITY),
        (lambda m, x: (x + m.f(x)).contiguous(), Shortcut.IDENTITY),
        (lambda m, x: m.scale * x + m.f(x), Shortcut.SCALED),
        (lambda m, x: (x + m.f(x)) * 0.5, Shortcut.SCALED),
        (lambda m, x: (x + m.f(x)) * x.size(1), Shortcut.SCALED),
        (lambda m, x: (x + m.f(x)) * x.shape[1], Shortcut.SCALED),
        (lambda m, x: m.act(x + m.f(x)), Shortcut.POST_ACTIVATION),
        (lambda m, x: F.gelu(x + m.f(x)), Shortcut.POST_ACTIVATION),
        (lambda m, x: m.norm(x + m.f(x)), Shortcut.POST_NORM),
        (lambda m, x: m.norm(m.act(x * 2 + m.f(x))), Shortcut.POST_NORM),
        (lambda m, x: m.f(x), None),
        (lambda m, x: m.act(m.f(x)), None),
        (lambda m, x: m.f(x) + m.g(x), None),
        (lambda m, x: x * m.f(x), None),
        (lambda m, x: x * m.f(x) + m.g(x), Shortcut.POST_ACTIVATION),  # a gate on the shortcut
        (lambda m, x: (x + m.g(x)) * m.f(x), Shortcut.POST_ACTIVATION),
        (lambda m, x: torch.stack((m.f(x), x)).sum(0), Shortcut.IDENTITY),
        (lambda m, x: torch.stack((m.f(x), m.g(x))).sum(0), None),
        (lambda m, x: torch.where(x > 0, x + m.f(x), x), Shortcut.IDENTITY),
        (lambda m, x: torch.rsub(m.f(x), x), Shortcut.IDENTITY),
        (lambda m, x: (x + m.f(x)).masked_fill(x > 0, 0.0), Shortcut.POST_ACTIVATION),
        (lambda m, x: torch.cat([x, m.f(x)], -1), None),
        (lambda m, x: m.f(x + m.f(x)), None),
        (lambda m, x: m.act(x) + m.f(x), None),
        (lambda m, x: m.norm(x) + m.f(x), None),
        (lambda m, x: x - m.f(x), Shortcut.IDENTITY),
        (lambda m, x: m.f(x) - x, Shortcut.IDENTITY),
        (lambda m, x: m.drop(x + m.f(x)), Shortcut.POST_ACTIVATION),
        (lambda m, x: F.dropout(x + m.f(x), 0.5, True), Shortcut.POST_ACTIVATION),
        (lambda m, x: torch.lerp(x, m.f(x), 0.3), Shortcut.SCALED),
        (lambda m, x: torch.addcmul(x, m.f(x), m.g(x)), Shortcut.SCALED),
        (lambda m, x: x + m.f(x) - 0.5, Shortcut.IDENTITY),
        (lambda m, x: torch.lerp(m.f(x), m.g(x), 0.3), None),
        (lambda m, x: m.drop(x) + m.f(x), None),
        (lambda m, x: x.softmax(-1) + m.f(x), None),
        (lambda m, x: m.f(x) + x.shape[0], None),
        (lambda m, x: x, None),
    ],
)
def test_shortcuts_in_graphs(function: Callable[[nn.Module, Tensor], Tensor], expected: Shortcut | None) -> None:
    assert shortcut_in(function) == expected


@pytest.mark.parametrize(("kind", "reason"), zoo.REFUSED.items())
def test_refusals_give_the_reason(kind: type[zoo.Net], reason: str) -> None:
    model = kind()
    plan = revify.plan(model, model.example())
    assert plan.stages == ()
    refused = {r.path: r for r in plan.refusals if reason in r.reason}
    assert "blocks.0" in refused
    assert refused["blocks.0"].remedy
    if kind is zoo.SingleBlocks:  # without a stage, but not without something to run again
        return
    with pytest.raises(revify.RefusalError) as caught:
        revify.convert(model, model.example())
    assert f"{kind.__name__} has no stage to convert" in str(caught.value)
    assert reason in str(caught.value)
    assert "gradient checkpointing" in str(caught.value)


class ConcatenatesWithin(zoo.NoShortcut):
    """What is concatenated is mixed again: the width does not grow."""

    class Block(zoo.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.cat([self.norm(x), x], -1))

    def __init__(self) -> None:
        zoo.Net.__init__(self, *(self.Block() for _ in range(3)))


class CallerAddsToOneValue(zoo.NoShortcut):
    """Every branch is added to the same value: no stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + sum(block(x) for block in self.blocks)).mean(1))


class LoopWithOtherShapes(zoo.NoShortcut):
    """A block of a sequence adds three times itself, to values of other shapes, so it is no run of steps."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for number, part in enumerate(self.parts):
                x = x + part(x[: 2 - number % 2].mean(0, keepdim=True)) if len(x) else x
            return x

    def __init__(self) -> None:
        zoo.Net.__init__(self, self.Block(), nn.Linear(6, 6))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ConcatenatesWithin, "no path of additions leads from its input to its output"),
        (CallerAddsToOneValue, "does not add to its input: what it returns is a branch, which its caller may add"),
        (LoopWithOtherShapes, "adds 3 times in its own forward, which cannot be cut into steps"),
    ],
)
def test_the_reason_is_the_one_that_a_reader_of_the_source_finds(kind: type[zoo.Net], reason: str) -> None:
    model = kind()
    refusals = {r.path: r for r in revify.plan(model, model.example()).refusals}
    assert refusals["blocks.0"].reason.startswith(reason)
    assert "stages=[" in refusals["blocks.0"].remedy


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vgg11", "the whole model: no module adds its input to its output"),
        (
            "densenet121",
            "features.denseblock1, features.denseblock2 and 2 more: its output is concatenated with its input",
        ),
    ],
)
def test_timm_models_without_residual_stages(name: str, reason: str) -> None:
    plan = revify.plan(timm.create_model(name), torch.zeros(2, 3, 64, 64))
    text = " ".join(str(plan).split())
    assert reason in text
    assert "no stage: nothing here is undone step by step" in text
    assert plan.checkpointed


def test_inner_additions_are_no_blocks() -> None:
    """GRN adds to its own input inside of a ConvNeXt V2 block; the stage is made of the blocks."""
    model = timm.create_model("test_convnext", use_grn=True)
    kinds = {block.kind for stage in revify.plan(model).stages for block in stage.blocks}
    assert kinds == {"ConvNeXtBlock"}


def test_blocks_are_found_one_by_one_where_the_whole_cannot_be_traced() -> None:
    plan = revify.plan(zoo.BranchesOnData(), torch.randn(zoo.TOKENS))
    assert [b.path for b in plan.stages[0].blocks] == [f"blocks.{i}" for i in range(4)]
    assert plan.traced.startswith("by a run, since torch.fx could not trace it: TraceError: symbolically traced")
    assert "traced by a run" in str(plan)
