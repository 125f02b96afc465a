"""Whoever names a budget gets the fastest plan that fits: any mix of kept, repeated and coded, always the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import zoo
from asserts import assert_same, assert_same_gradients, inputs_of, run
from torch import nn

import revify
from revify import Plan
from revify.estimates import CHECKPOINTED, PLAIN, THIS_PLAN
from revify.measuring.memory import count_memory
from revify.plans import CheckpointPlan

KINDS = (
    zoo.PreNormBlocks,
    zoo.DropoutAndDropPath,
    zoo.PostActivationBatchNorm,
    zoo.TwoStages,
    zoo.LayersInARow,
    zoo.SideInputsWithGradient,
    zoo.ReturnsTuples,
)
MIXES = (  # of the blocks of a stage, begun anew where it is shorter
    ("keep",),
    ("recompute",),
    (None, "keep"),
    ("keep", None, None),
    (None, None, "recompute"),
    (None, "recompute", "keep"),
)


def made(kind: type[zoo.Net]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def mixed(plan: Plan, mix: tuple[str | None, ...]) -> Plan:
    """The plan with these modes for the blocks of each stage."""
    stages, again = [], []
    for number, stage in enumerate(plan.stages):
        blocks = tuple(replace(b, mode=mix[place % len(mix)]) for place, b in enumerate(stage.blocks))
        again += [CheckpointPlan(b.path, b.saved_bytes, 0, after=number) for b in blocks if b.mode == "recompute"]
        stages.append(replace(stage, blocks=blocks))
    return replace(plan, stages=tuple(stages), checkpointed=(*plan.checkpointed, *again))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(3)
def test_any_mix_of_modes_gives_the_same_bits(
    kind: type[zoo.Net], mix: tuple[str | None, ...], autocast: torch.dtype | None
) -> None:
    model = made(kind)
    plan = mixed(revify.plan(model, model.example(), transitions="keep"), mix)
    assert Plan.from_json(plan.to_json()) == plan
    converted = revify.convert(model, model.example(), plan=plan)
    assert_same_gradients(converted, inputs_of(model), autocast=autocast)
    assert_same(run(revify.revert(converted), inputs_of(model)), run(model, inputs_of(model)))


def test_what_is_not_coded_is_the_plain_function() -> None:
    model = made(zoo.PostActivationBatchNorm)
    plan = mixed(revify.plan(model, model.example()), ("keep", "recompute"))
    converted = revify.convert(model, model.example(), plan=plan)
    assert_same(run(converted, inputs_of(model)), run(model, inputs_of(model)))


@pytest.mark.parametrize("kind", [*KINDS, zoo.SingleBlocks])
@pytest.mark.parametrize("budget", ["min", 1.5])
def test_plans_within_a_budget_give_the_same_bits(kind: type[zoo.Net], budget: str | float) -> None:
    model = made(kind)
    least = revify.plan(model, model.example(), budget="min").predicted_peak
    asked = budget if isinstance(budget, str) else int(budget * least)
    converted = revify.convert(model, model.example(), budget=asked)
    plan = converted.revify_plan
    assert plan.predicted_peak <= (2 * least if budget == "min" else asked)
    assert Plan.from_json(plan.to_json()) == plan
    assert_same_gradients(converted, inputs_of(model))


def test_more_budget_is_never_slower_and_never_exceeded() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64)
    x = torch.zeros(2, 3, 64, 64)
    points = revify.plan(model, x, budget="min").points
    plain = next(point for point in points if point.name == PLAIN)
    least = next(point for point in points if point.name == THIS_PLAN)
    before = least.time + 0.01
    for share in (0.0, 0.4, 1.0):
        budget = int(1.01 * least.peak + share * (plain.peak - least.peak) * 1.05)
        own = next(p for p in revify.plan(model, x, budget=budget).points if p.name == THIS_PLAN)
        assert own.peak <= budget
        assert own.time <= before + 0.001
        before = own.time
    assert before == 1  # with the memory of ordinary autograd, nothing runs again


def test_the_predicted_peak_is_the_measured_one() -> None:
    """But for what checksums take, half a megabyte here."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    x = torch.randn(2, 3, 224, 224)
    for budget in ("min", 12_000_000):
        converted = revify.convert(model, x, budget=budget)
        converted(x).square().mean().backward()
        found = count_memory(lambda m=converted: m(x).square().mean(), x.device).peak
        assert abs(converted.revify_plan.predicted_peak / found - 1) < 0.1


def test_what_does_not_fit_says_the_least_that_would() -> None:
    model = made(zoo.PreNormBlocks)
    least = revify.plan(model, model.example(), budget="min").predicted_peak
    with pytest.raises(revify.RevifyError, match=r"does not fit into budget=100: .* the least that any plan needs"):
        revify.plan(model, model.example(), budget=100)
    assert least > 100


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * 2**30), ("500MB", 500_000_000), ("1.5 kb", 1500), ("1e6", 10**6), ("min", "min")]
)
def test_budgets_as_text(text: str, size: int | str) -> None:
    assert revify.Method(budget=text).bytes_allowed == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "much"}, "budget='much' is no size"),
        ({"budget": 0}, "needs memory"),
        ({"budget": -1}, "is no size"),
        ({"budget": "1GiB", "streams": "split"}, "budget= is for full streams"),
    ],
)
def test_budgets_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        revify.Method(**options)


def test_the_frontier_is_a_table() -> None:
    plan = revify.plan(timm.create_model("test_vit"), torch.zeros(2, 3, 160, 160))
    names = [point.name for point in plan.frontier().points]
    assert names[:3] == [PLAIN, CHECKPOINTED, THIS_PLAN]
    assert len(names) > 4
    assert "VisionTransformer: time against memory, predicted" in str(plan.frontier())
    assert "one training step, predicted: plain" in " ".join(str(plan).split())
    converted = revify.convert(timm.create_model("test_vit"))
    with pytest.raises(revify.RevifyError, match="has no predictions"):
        converted.revify_plan.frontier()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda p: mixed(p, ("recompute",)).stages, "is to run again, but is in nothing that is checkpointed"),
        (
            lambda p: tuple(replace(s, step="recurrence") for s in mixed(p, ("keep",)).stages),
            "only blocks of coded stages",
        ),
    ],
)
def test_modes_that_do_not_go_together(change: object, fault: str) -> None:
    model = made(zoo.PreNormBlocks)
    plan = revify.plan(model, model.example(), transitions="keep")
    broken = replace(plan, stages=change(plan))  # type: ignore[operator]
    with pytest.raises(revify.RevifyError, match=fault):
        Plan.from_json(broken.to_json())
