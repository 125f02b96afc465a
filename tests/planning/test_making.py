"""The plan is a frozen record: it prints, goes through JSON unchanged, and counts bytes that are true."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import zoo
from branch_nets import Two, net
from ledger import Ledger

import revify
from revify import Plan
from revify.plans import FORMAT, CheckpointPlan


def plan_of(kind: type[zoo.Net], **options: object) -> Plan:
    model = kind()
    return revify.plan(model, model.example(), **options)


@pytest.mark.parametrize("kind", [*zoo.CONVERTIBLE, *zoo.REFUSED])
@pytest.mark.parametrize("options", [{}, {"bits": 2, "predictor": "midpoint", "grid": 9, "transitions": "checkpoint"}])
@pytest.mark.sampled(3)
def test_json_gives_the_same_plan_back(kind: type[zoo.Net], options: dict[str, object]) -> None:
    plan = plan_of(kind, **options)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert str(again) == str(plan)
    assert json.loads(plan.to_json())["format"] == FORMAT


def test_json_of_a_timm_model() -> None:
    plan = revify.plan(timm.create_model("test_vit"), transitions="checkpoint")
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("how", ["branch", "split"])
def test_plans_written_before_fields_were_renamed_are_read(how: str) -> None:
    model = net(Two, 2)
    options = {"unit": "branch"} if how == "branch" else {"streams": "split"}
    old = Plan.from_json((Path(__file__).parent / "old" / f"plan_{how}.json").read_text(encoding="utf-8"))
    new = revify.plan(model, model.example(), **options)
    assert [stage.blocks for stage in old.stages] == [stage.blocks for stage in new.stages]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this text is no revify plan"),
        ("[1]", "this text is no revify plan"),
        ('{"stages": []}', "this text is no revify plan"),
        (json.dumps({"format": FORMAT + 1}), f"this plan has format {FORMAT + 1}; .* install a newer revify"),
        (json.dumps({"format": FORMAT, "stages": []}), "this revify plan is damaged .*: write it again with"),
    ],
)
def test_text_that_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize("key", ["stages", "refusals", "example", "grid"])
def test_damaged_plan(key: str) -> None:
    fields = json.loads(plan_of(zoo.PreNormBlocks).to_json())
    del fields[key]
    with pytest.raises(revify.RevifyError, match="this revify plan is damaged"):
        Plan.from_json(json.dumps(fields))


def test_plan_is_frozen() -> None:
    plan = plan_of(zoo.PreNormBlocks)
    for record, name in ((plan, "grid"), (plan.stages[0], "bits"), (plan.stages[0].blocks[0], "path")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, 1)


def test_options_are_in_the_plan() -> None:
    plan = plan_of(zoo.TwoStages, bits=2, predictor="midpoint", grid=9, transitions="checkpoint")
    assert [(s.bits, s.predictor) for s in plan.stages] == [(2, "midpoint")] * 2
    assert (plan.grid, plan.transitions, plan.model) == (9, "checkpoint", "TwoStages")
    assert plan.example == ((2, 6, 4, 5),)


def test_blocks_name_their_stream() -> None:
    assert {b.stream for b in plan_of(zoo.SideInputsWithGradient).stages[0].blocks} == {"x"}
    assert {b.stream for b in plan_of(zoo.PreNormBlocks).stages[0].blocks} == {0}


def test_table_says_what_will_be_done() -> None:
    text = str(plan_of(zoo.TwoStages, bits=3, transitions="checkpoint"))
    assert "TwoStages, input 2×6×4×5" in text
    assert "stages.0.0 … stages.0.2 (3 Convolutions)" in text
    assert "6×4×5" in text
    assert "post-activation" in text
    assert "coded" in text
    assert "identity" in str(plan_of(zoo.TwoStages, bits=3, step="recurrence"))
    assert "checkpointed: transition" in text
    assert "saved for backward: plain" in text
    assert "predicted peak converted" in text


def test_table_groups_refusals() -> None:
    text = str(plan_of(zoo.DenseConcat))
    assert "left as it is: blocks.0, blocks.1, blocks.2: its output is concatenated" in text


def test_table_names_the_timm_architecture() -> None:
    assert "test_vit (VisionTransformer), input 2×3×160×160" in str(revify.plan(timm.create_model("test_vit")))


def test_transition_between_stages_is_checkpointed_and_stem_and_head_are_not() -> None:
    plan = plan_of(zoo.TwoStages, transitions="checkpoint")
    assert [c.path for c in plan.checkpointed] == ["transition"]
    assert plan.checkpointed[0].input_bytes == 960  # a coded stage holds its input, not its output
    recurrence = plan_of(zoo.TwoStages, step="recurrence", transitions="checkpoint")
    assert recurrence.checkpointed[0].input_bytes == 0  # it is what the first stage holds
    assert plan.checkpointed[0].after == 1
    assert plan_of(zoo.TwoStages, transitions="keep").checkpointed == ()


def test_transitions_of_timm_models_are_checkpointed() -> None:
    plan = revify.plan(timm.create_model("resnet50"), torch.zeros(2, 3, 64, 64), transitions="checkpoint")
    blocks = {b.path for stage in plan.stages for b in stage.blocks}
    paths = {c.path for c in plan.checkpointed}
    assert "layer2.0" in paths
    assert not paths & blocks
    assert not paths & {"global_pool", "fc"}


def test_layers_of_a_stem_are_checkpointed_together() -> None:
    plan = revify.plan(timm.create_model("resnet18"), torch.zeros(2, 3, 64, 64), transitions="checkpoint")
    stem, *others = plan.checkpointed
    assert stem.paths == ("conv1", "bn1", "act1", "maxpool")
    assert (stem.input_bytes, stem.after) == (2 * 3 * 64 * 64 * 4, 0)
    assert [c.after for c in others] == sorted(c.after for c in others)
    assert "checkpointed: conv1, bn1, act1, maxpool (" in str(plan)
    assert revify.Plan.from_json(plan.to_json()) == plan


def test_a_large_transition_is_parted_where_that_lowers_the_peak() -> None:
    """blocks.1 of the EfficientNet, two lone blocks, would hold more than anything else when it runs again."""
    plan = revify.plan(timm.create_model("efficientnet_b0"), torch.zeros(2, 3, 64, 64), transitions="checkpoint")
    stem, first, second, *others = plan.checkpointed
    assert stem.paths == ("conv_stem", "bn1", "blocks.0")
    assert (first.paths, second.paths) == (("blocks.1.0",), ("blocks.1.1",))
    whole = CheckpointPlan("blocks.1", first.saved_bytes + second.saved_bytes, first.input_bytes)
    assert replace(plan, checkpointed=(stem, whole, *others)).predicted_bytes > plan.predicted_bytes


def test_joining_does_not_raise_the_predicted_peak() -> None:
    """regnety's first transition is far larger than any block: with the stem, it would hold most of all when it runs."""
    plan = revify.plan(timm.create_model("regnety_004"), torch.zeros(2, 3, 64, 64), transitions="checkpoint")
    together = CheckpointPlan("stem", plan.checkpointed[0].saved_bytes + plan.checkpointed[1].saved_bytes, 0, ("s1",))
    assert [c.path for c in plan.checkpointed[:2]] == ["stem", "s1"]
    assert replace(plan, checkpointed=(together, *plan.checkpointed[2:])).predicted_bytes > plan.predicted_bytes


def test_predicted_peak_counts_what_is_held_by_then() -> None:
    """A large checkpoint at the start runs again when all else is gone; the same at the end when all is held."""
    plan = replace(plan_of(zoo.TwoStages, bits=0), checkpointed=(), saved_bytes=1_000_000)
    first, second = plan.stages
    kept = 1_000_000 - first.saved_bytes - second.saved_bytes - 100_000
    for after, held in ((0, 0), (1, first.held_bytes), (2, first.held_bytes + second.held_bytes)):
        checkpoint = CheckpointPlan("x", 100_000, 10, after=after)
        assert replace(plan, checkpointed=(checkpoint,)).predicted_bytes == kept + held + 10 + 100_000


def test_share_of_the_stages() -> None:
    plan = plan_of(zoo.TwoStages)
    inside = sum(stage.saved_bytes for stage in plan.stages)
    assert plan.stage_share == inside / plan.saved_bytes
    assert 0.5 < plan.stage_share < 1


def test_held_bytes_of_a_stage() -> None:
    asked = {"bits": 2, "step": "recurrence"}
    (stage,) = plan_of(zoo.PreNormBlocks, **asked).stages
    assert stage.held_bytes == 2 * 240 + 3 * (60 * 2 // 8)
    (wide,) = revify.plan(zoo.PreNormBlocks().double(), torch.zeros(zoo.TOKENS).double(), **asked).stages
    assert wide.held_bytes == 2 * 480 + 3 * (60 * 2 // 8)
    (coded,) = plan_of(zoo.PreNormBlocks, bits=8).stages
    assert coded.held_bytes == 240 + 3 * (60 + 2 * 2)  # two samples of 30 elements, which share one scale of two bytes


@pytest.mark.parametrize("transitions", ["keep", "checkpoint"])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "resnet50"])
@pytest.mark.sampled(2)
def test_prediction_is_near_the_truth(name: str, bits: int, transitions: str) -> None:
    """What lives after forward, against what the plan says is held."""
    torch.manual_seed(0)
    model = timm.create_model(name, **({"img_size": 96} if "vit" in name else {}))
    converted = revify.convert(model, torch.zeros(2, 3, 96, 96), bits=bits, transitions=transitions)
    plan = converted.revify_plan
    with Ledger() as ledger:
        x = torch.randn(2, 3, 96, 96)
        output = converted(x)
        alive = ledger.alive()
    del output
    held = plan.saved_bytes
    held -= sum(stage.saved_bytes - stage.held_bytes for stage in plan.stages)
    held -= sum(c.saved_bytes - c.input_bytes for c in plan.checkpointed)
    assert 0.95 < alive / held < 1.05


SURVEY = {
    "resnet50": [2, 3, 5, 2],
    "vit_small_patch16_224": [12],
    "swin_tiny_patch4_window7_224": [2, 2, 6, 2],
    "convnext_tiny": [3, 3, 9, 3],
    "efficientnetv2_rw_s": [2, 3, 3, 5, 8, 14],
    "mixer_b16_224": [12],
}


@pytest.mark.parametrize("name", SURVEY)
@pytest.mark.sampled(2)
def test_stages_are_those_of_the_survey(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = revify.plan(model)
    assert [len(stage.blocks) for stage in plan.stages] == SURVEY[name]
    assert plan.architecture == name
    assert plan.traced == "whole"


def test_a_frozen_model_is_planned_as_it_would_be_trained() -> None:
    model = zoo.PreNormBlocks()
    expected = revify.plan(model, model.example())
    model.requires_grad_(False)
    assert revify.plan(model, model.example()) == expected
    assert not any(p.requires_grad for p in model.parameters())
