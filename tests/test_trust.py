"""Files and plans from strangers: what they name is not run, what they ask for is not allocated, nonsense is one sentence."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import zoo
from torch import nn

import revify
from revify.plans import Plan
from revify.records import FaultError, parse

SECONDS, SPARE = 5, 400 * 2**20


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=10, img_size=64)


def plan_of(kind: type[zoo.Net], **options: Any) -> dict[str, Any]:
    model = kind()
    return json.loads(revify.plan(model, model.example(), **options).to_json())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT's file with its architecture."""
    path = tmp_path_factory.mktemp("stranger") / "vit.safetensors"
    revify.save(
        revify.convert(vit(), bits=2), path, {"name": "test_vit", "kwargs": {"num_classes": 10, "img_size": 64}}
    )
    return path


def changed(file: Path, out: Path, plan: Any = None, architecture: Any = None) -> Path:
    """The same weights with other metadata."""
    with safetensors.safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    if plan is not None:
        metadata["plan"] = json.dumps(plan)
    if architecture is not None:
        metadata["architecture"] = json.dumps(architecture)
    safetensors.torch.save_file(safetensors.torch.load_file(file), out / "changed.safetensors", metadata)
    return out / "changed.safetensors"


def stored_plan(file: Path) -> dict[str, Any]:
    with safetensors.safe_open(file, framework="pt") as handle:
        return json.loads(handle.metadata()["plan"])


@pytest.fixture
def frugal() -> Iterator[None]:
    """The test takes little time and memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < SPARE


# Nothing that a file names is run


@pytest.mark.parametrize(
    "name",
    [
        "os:abort",
        "os:_exit",
        "builtins:exec",
        "test_trust:trap",
        "os.path:join",
        "derive",
        "check",
        "torch",
        "__doc__",
        "a b",
    ],
)
def test_a_file_runs_nothing_by_naming_it_as_its_coupling(tmp_path: Path, name: str) -> None:
    model = zoo.PreNormBlocks()
    revify.save(revify.convert(model, model.example(), streams="split"), tmp_path / "m.safetensors")
    plan = stored_plan(tmp_path / "m.safetensors")
    for stage in plan["stages"]:
        stage["coupling"] = name
    path = changed(tmp_path / "m.safetensors", tmp_path, plan)
    with pytest.raises(revify.CheckpointError, match=r"not known|no name"):
        revify.load(path, zoo.PreNormBlocks())
    with pytest.raises(revify.RevifyError, match=r"not known|no name"):
        revify.convert(zoo.PreNormBlocks(), plan=Plan.from_json(json.dumps(plan)))


def trap(*_: object) -> None:
    raise AssertionError("a file had this called")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"checkpoint_path": "x"},
        {"pretrained_cfg": {"url": "http://localhost"}},
        {"pretrained_cfg_overlay": {"file": "x"}},
        {"cache_dir": "x"},
        {"pretrained_model_args": {}},
        {"device": "cuda"},
        {"device": "cpu"},
    ],
)
def test_an_architecture_opens_no_file_and_chooses_no_device(file: Path, tmp_path: Path, kwargs: Any) -> None:
    path = changed(file, tmp_path, architecture={"name": "test_vit", "kwargs": kwargs})
    with pytest.raises(revify.CheckpointError, match=r"opens other files|to choose"):
        revify.load(path)


@pytest.mark.parametrize(
    "name", ["hf-hub:x/y", "local-dir:/tmp", "../x", "test_vit:x", 3, None, ["test_vit"], "\x1b[2J"]
)
def test_an_architecture_is_a_name_of_timm(file: Path, tmp_path: Path, name: Any) -> None:
    path = changed(file, tmp_path, architecture={"name": name, "kwargs": {}})
    with pytest.raises(revify.CheckpointError, match="is not the name of a timm model") as caught:
        revify.load(path)
    assert "\x1b" not in str(caught.value)


# Nothing is allocated for a small file


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"embed_dim": 10**6},
        {"embed_dim": 4096, "depth": 4096},
        {"depth": 10**6},
        {"depth": 4096},
        {"depth": 4096, "embed_dim": 8, "num_heads": 1},
        {"img_size": 10**6},
        {"img_size": 4096, "patch_size": 1},
        {"num_classes": 10**9},
        {"num_classes": 10**300},
        {"mlp_ratio": 1e9},
        {"mlp_ratio": 4000.0},
        {"reg_tokens": 2**60},
        {"act_layer": "x" * 10**6},
        {"depth": [10**6] * 10**4},
        {"depth": -1},
        {"depth": True},
    ],
    ids=str,
)
def test_an_architecture_asks_for_no_more_than_the_stored_tensors_fill(file: Path, tmp_path: Path, kwargs: Any) -> None:
    path = changed(file, tmp_path, architecture={"name": "test_vit", "kwargs": {"img_size": 64, **kwargs}})
    with pytest.raises(revify.CheckpointError):
        revify.load(path)


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "convnext_xxlarge", "swin_large_patch4_window12_384"])
def test_a_small_file_builds_no_giant(file: Path, tmp_path: Path, name: str) -> None:
    path = changed(file, tmp_path, architecture={"name": name, "kwargs": {}})
    with pytest.raises(revify.CheckpointError, match="does not fit"):
        revify.load(path)


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize(
    "stage",
    [
        {"predictor": "lowrank", "rank": 2_000_000},
        {"predictor": "lowrank", "rank": 64},
        {"predictor": "linear", "shape": [2, 17, 10**6]},
        {"predictor": "linear", "shape": [2, 17, 2**40]},
        {"predictor": "linear", "shape": [2, 17, 2**60]},
        {"predictor": "diagonal", "axis": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("give", [True, False])
def test_predictors_are_as_large_as_what_is_stored(file: Path, tmp_path: Path, stage: Any, give: bool) -> None:
    plan = stored_plan(file)
    for each in plan["stages"]:
        each.update(stage)
    path = changed(file, tmp_path, plan)
    with pytest.raises(revify.CheckpointError):
        revify.load(path, vit() if give else None)


@pytest.mark.usefixtures("frugal")
def test_a_file_that_fits_no_type_is_refused(file: Path, tmp_path: Path) -> None:
    """torch would turn whole numbers and truth values into weights without a word."""
    with safetensors.safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = safetensors.torch.load_file(file)
    complex_kinds = () if safetensors.__version__.startswith("0.5.") else (torch.complex64,)
    for dtype in (torch.int64, torch.bool, *complex_kinds):
        other = {**tensors, "head.weight": tensors["head.weight"].to(dtype)}
        safetensors.torch.save_file(other, tmp_path / "other.safetensors", metadata)
        with pytest.raises(revify.CheckpointError, match=r"of another type: head.weight .* in the file, floats"):
            revify.load(tmp_path / "other.safetensors", vit())


@pytest.mark.usefixtures("frugal")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(revify.CheckpointError, match="no ordinary file"):
        revify.load(tmp_path / "pipe.safetensors", vit())


# Nonsense in a plan is one sentence


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("grid", 2000),
        ("grid", -1),
        ("grid", 12.0),
        ("grid", True),
        ("transitions", "nosuch"),
        ("saved_bytes", 10**30),
        ("saved_bytes", -5),
        ("traced", ["whole"]),
        ("traced", "\ud800"),
        ("model", None),
        ("model", "x" * 10**5),
        ("model", "\x1b[2J"),
        ("example", 3),
        ("example", [[2, "3"]]),
        ("example", [[-2]]),
        ("nosuch", 1),
        ("stages", {}),
        ("stages", [3]),
        ("stages.0.bits", 99),
        ("stages.0.bits", None),
        ("stages.0.predictor", "nosuch"),
        ("stages.0.predictor", "–"),
        ("stages.0.predictor", "linear_z "),
        ("stages.0.sign", "minus"),
        ("stages.0.axis", 9),
        ("stages.0.rank", 3),
        ("stages.0.dtype", "float7"),
        ("stages.0.dtype", "tensor"),
        ("stages.0.deviation", float("nan")),
        ("stages.0.deviation", "1"),
        ("stages.0.coupling", "additive"),
        ("stages.0.blocks", []),
        ("stages.0.blocks.0.path", 3),
        ("stages.0.blocks.0.stream", -1),
        ("stages.0.blocks.0.stream", 1.5),
        ("stages.0.blocks.0.stream", None),
        ("stages.0.blocks.0.shortcut", "nothing"),
        ("stages.0.blocks.0.bits", 9),
        ("stages.0.blocks.0.branch_bytes", [1]),
        ("stages.0.blocks.1.path", "0"),
        ("stages.0.blocks.0.split_branches", [{"how": "torn", "cuts": [], "saved_bytes": 0}]),
        ("refusals", [{"path": "", "reason": 3, "remedy": ""}]),
        ("checkpointed", [{"path": "x", "saved_bytes": 0, "input_bytes": 0, "after": 99}]),
    ],
)
def test_nonsense_in_a_plan_is_found_when_it_is_read(path: str, value: Any) -> None:
    plan = plan_of(zoo.PreNormBlocks)
    if path == "stages.0.blocks.1.path":
        value = plan["stages"][0]["blocks"][0]["path"]
    *way, last = path.split(".")
    place = plan
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    with pytest.raises(revify.RevifyError, match="this revify plan is damaged") as caught:
        Plan.from_json(json.dumps(plan))
    text = str(caught.value)
    assert len(text) < 600
    assert text.isprintable()
    assert any(word in text for word in (last, "stage", "the block"))


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"format":' * 10**5,
        "[]," * 10**6,
        "[" + "[]," * 10**6 + "0]",
        "9" * 10**6,
        '{"format": 1e999}',
        "\x00",
    ],
    ids=range(7),
)
def test_text_that_is_deep_or_long_is_no_plan(text: str) -> None:
    with pytest.raises(revify.RevifyError, match=r"is no revify plan|has format"):
        Plan.from_json(text)


def test_every_field_can_be_of_every_wrong_type() -> None:
    for plan in (plan_of(zoo.PreNormBlocks), plan_of(zoo.PreNormBlocks, streams="split")):
        for other in wrong(plan):
            with suppress(revify.RevifyError):
                str(Plan.from_json(json.dumps(other)))


def wrong(value: Any) -> Iterator[Any]:
    """The value with one of its parts replaced."""
    yield from (None, -1, 10**40, 1.5, True, "x", [], {}, [[]], "[/]")
    if isinstance(value, dict):
        for key, item in value.items():
            for other in wrong(item):
                yield {**value, key: other}
            yield {k: v for k, v in value.items() if k != key}
    if isinstance(value, list):
        for number, item in enumerate(value[:2]):
            for other in wrong(item):
                yield [*value[:number], other, *value[number + 1 :]]


@pytest.mark.parametrize("name", ["[/]", "[bold]x[/bold]", ":smile:", "[link=http://x]y", "\\[", "a\nb"])
def test_names_are_drawn_as_they_are(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    layers = nn.Sequential()
    for number in range(3):
        layers.add_module(f"{name}{number}", zoo.Mlp(6))
    model.append(layers)
    plan = revify.plan(model, torch.zeros(2, 6))
    text = str(plan)
    assert name.replace("\n", " ") in text.replace("\n", "") or "…" in text
    plan = json.loads(plan.to_json())
    plan["refusals"] = [{"path": "x", "reason": name, "remedy": name}]
    if "\n" not in name:
        assert name in str(Plan.from_json(json.dumps(plan)))


def test_a_number_that_was_not_measured_is_written_as_such() -> None:
    model = zoo.PreNormBlocks()
    plan = revify.plan(model, model.example())
    odd = replace(plan, stages=tuple(replace(each, deviation=float("nan")) for each in plan.stages))
    assert Plan.from_json(odd.to_json()).stages[0].deviation is None


def test_json_is_parsed_within_bounds() -> None:
    assert parse('{"a": [1, null]}') == {"a": [1, None]}
    with pytest.raises(FaultError, match="nested too deeply"):
        parse("[" * 10**5 + "]" * 10**5)
