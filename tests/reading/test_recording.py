"""What torch.fx cannot trace is recorded in a run, in the terms of a traced graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import zoo
from asserts import Unchanged
from torch import Tensor, nn

from revify.reading.recording import follow, record
from revify.reading.roles import Shortcut, concatenates, find_shortcut


class Body(nn.Module):
    """A function of x with layers to call."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.norm, self.act = nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.ones(6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def shortcut_in(function: Callable[[nn.Module, Tensor], Tensor]) -> Shortcut | None:
    recorded = record(nn.Sequential(Body(function)), [torch.zeros(2, 5, 6)], "for the test")
    (call,) = recorded.calls["0"]
    return find_shortcut(call.given(0), call.result(None), recorded.modules)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x + m.f(x), Shortcut.IDENTITY),
        (lambda m, x: x.__radd__(m.f(x)), Shortcut.IDENTITY),
        (lambda m, x: torch.add(m.f(x), x), Shortcut.IDENTITY),
        (lambda m, x: m.f(x).add_(x), Shortcut.IDENTITY),
        (lambda m, x: m.f(x).__iadd__(x), Shortcut.IDENTITY),
        (lambda m, x: (x.mT + m.f(x).mT).mT, Shortcut.IDENTITY),
        (lambda m, x: torch.cat([p + m.f(p) for p in x.chunk(5, 1)], 1), Shortcut.IDENTITY),
        (lambda m, x: x[:, :, None][:, :, 0] + m.f(x), Shortcut.IDENTITY),
        (lambda m, x: x + m.f(x) if len(x) > 1 and x.shape[0] % 2 == 0 else x, Shortcut.IDENTITY),
        (lambda m, x: m.scale * x + m.f(x), Shortcut.SCALED),
        (lambda m, x: 2 * (x + m.f(x)), Shortcut.SCALED),
        (lambda m, x: m.act(x + m.f(x)), Shortcut.POST_ACTIVATION),
        (lambda m, x: F.relu(x + m.f(x)), Shortcut.POST_ACTIVATION),
        (lambda m, x: m.norm(x + m.f(x)), Shortcut.POST_NORM),
        (lambda m, x: F.layer_norm(x + m.f(x), (6,)), Shortcut.POST_NORM),
        (lambda m, x: m.f(x), None),
        (lambda m, x: x - m.f(x), Shortcut.IDENTITY),
        (lambda m, x: x.lerp(m.f(x), 0.5) - 0.5, Shortcut.SCALED),
        (lambda m, x: x * m.f(x), None),
        (lambda m, x: torch.cat([x, m.f(x)], -1), None),
        (lambda m, x: m.norm(x) + m.f(x), None),
    ],
)
def test_shortcuts(function: Callable[[nn.Module, Tensor], Tensor], expected: Shortcut | None) -> None:
    assert shortcut_in(function) == expected


def test_what_can_be_traced_is_not_recorded() -> None:
    assert follow(zoo.PreNormBlocks(), [torch.zeros(zoo.TOKENS)]).failure is None
    recorded = follow(zoo.UntraceableBlocks(), [torch.zeros(zoo.TOKENS)])
    assert recorded.failure is not None
    assert "'len' is not supported in symbolic tracing" in recorded.failure


def test_calls_are_linked() -> None:
    calls = follow(zoo.UntraceableBlocks(), [torch.zeros(zoo.TOKENS)]).calls
    assert calls["blocks.1"][0].given(0) is calls["blocks.0"][0].result(None)
    assert calls["blocks.2"][0].given(0) is not calls["blocks.0"][0].result(None)


def test_nodes_know_their_modules() -> None:
    recorded = record(zoo.DenseConcat(), [torch.zeros(zoo.DenseConcat.SHAPE)], "for the test")
    assert recorded.graph is not None
    stacks = [(node, set(node.meta.get("nn_module_stack", ()))) for node in recorded.graph.nodes]
    (call,), (stem,) = recorded.calls["blocks.0"], recorded.calls["stem"]
    assert concatenates(call.given(0), call.output, recorded.modules)
    assert any("stem" in stack for _, stack in stacks)
    assert not concatenates(stem.given(0), call.output, recorded.modules)


def test_model_stays_as_it_is() -> None:
    model = zoo.UntraceableBlocks()
    with Unchanged(model):
        follow(model, [torch.zeros(zoo.TOKENS)])
