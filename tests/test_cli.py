"""The command line: what each command prints and writes, its exit codes, and errors in one paragraph."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import revify
from revify.cli import main
from revify.options import make_parser
from revify.plans import Plan

TINY = ["test_vit", "--img-size", "16", "--model-kwargs", "patch_size=8", "depth=4"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose more time in handing work to threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    digits = load_digits()
    for target in (0, 1):
        folder = tmp_path / "images" / str(target)
        folder.mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == target][:10]):
            Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    """The one paragraph on standard error that a command fails with; nothing is on standard output."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("revify: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


def test_plan_prints_its_table_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *TINY, "--bits", "2", "--predictor", "midpoint", "--sign", "random", "--json", str(file)]) == 0
    plan = Plan.from_json(file.read_text())
    table = capsys.readouterr().out
    assert table.strip() == str(plan).strip()
    assert "midpoint ±" in table
    assert plan.stages[0].sign == "random"
    assert [len(stage.blocks) for stage in plan.stages] == [4]
    assert (plan.stages[0].bits, plan.stages[0].predictor) == (2, "midpoint")
    assert plan.example == ((2, 3, 16, 16),)


def test_convert_writes_a_file_for_both_libraries(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    assert main(["convert", *TINY, "--num-classes", "7", "--bits", "1", "--out", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    converted = revify.load(file)
    plain = timm.create_model("test_vit", img_size=16, patch_size=8, depth=4, num_classes=7, checkpoint_path=str(file))
    assert converted.revify_plan.stages[0].bits == 1
    for name, value in plain.state_dict().items():
        assert torch.equal(value, converted.state_dict()[name])


def test_convert_starts_from_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert main(["convert", *TINY, "--num-classes", "7", "--out", str(first)]) == 0
    assert main(["convert", *TINY, "--checkpoint", str(first), "--out", str(second)]) == 0
    one, two = revify.load(first).state_dict(), revify.load(second).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    error = fails(capsys, "convert", "test_vit2", "--checkpoint", str(first), "--out", str(second))
    assert f"the weights in {first} do not fit test_vit2" in error
    assert "retrained" not in error


def test_measure_prints_three_forms(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    arguments = [
        "measure",
        *TINY,
        "--batch-size",
        "4",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--json",
        str(file),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert {"plain", "checkpointed", "converted"} <= {line.split()[0] for line in out.splitlines() if line}
    assert json.loads(file.read_text())["batch"] == [[4, 3, 16, 16]]


def test_finetune(capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["finetune", *TINY, "--data", str(images), "--out", str(out)]
    options = ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--scale", "0.9", "1"]
    assert main([*command, *options]) == 0
    captured = capsys.readouterr()
    rows = {line.split()[0]: line for line in captured.out.splitlines() if line}
    assert "converted" in rows
    assert "reverted" in rows
    assert "epoch 1/1" in captured.err
    assert str(out) in captured.err
    assert json.loads((out / "recipe.json").read_text())["scale"] == [0.9, 1.0]
    assert timm.create_model(
        "test_vit",
        img_size=16,
        patch_size=8,
        depth=4,
        num_classes=2,
        checkpoint_path=out / "plain.safetensors",
    )

    assert "holds a run already" in fails(capsys, *command, *options)
    assert main([*command, *options[2:], "--epochs", "2", "--resume"]) == 0
    assert "epoch 2/2" in capsys.readouterr().err


def test_unknown_names_come_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nearest: vit_tiny_patch16_224," in fails(capsys, "plan", "vit_tny_patch16_224")
    assert "nearest: resnet18.a1_in1k" in fails(capsys, "plan", "resnet18.nonsense")
    assert "timm knows no model '§§§'; timm" in fails(capsys, "plan", "§§§")


def test_no_network_for_pretrained_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unresolved(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    error = fails(capsys, "convert", "test_vit", "--pretrained", "--out", str(tmp_path / "x.safetensors"))
    assert "pretrained weights of test_vit could not be fetched" in error
    assert "--checkpoint FILE" in error
    assert not list(tmp_path.iterdir())


def test_the_hub_fails_later(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def failing(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("An error happened\nwhile trying to locate the file.")

    monkeypatch.setattr("revify.finetuning.timm_models._check_network", lambda name: None)
    monkeypatch.setattr(timm, "create_model", failing)
    error = fails(capsys, "plan", "test_vit", "--pretrained")
    assert "could not be fetched from the Hugging Face hub (LocalEntryNotFoundError: An error happened" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", *TINY, "depht=3"], "unexpected keyword argument 'depht'"),
        (["plan", *TINY, "--bits", "9"], "bits=9"),
        (["plan", *TINY, "--predictor", "guess"], "identity, midpoint"),
        (["plan", *TINY, "--json", "/nonexistent/plan.json"], "/nonexistent/plan.json cannot be written"),
        (["convert", "vgg11", "--img-size", "32", "--out", "/nonexistent/x"], "could not be written"),
        (["convert", *TINY, "--checkpoint", "nowhere.pt", "--out", "x"], "there is no such file"),
        (["convert", *TINY, "--checkpoint", __file__, "--out", "x"], "cannot be read"),
        (["convert", *TINY, "--pretrained", "--checkpoint", "x", "--out", "y"], "give one of them"),
        (["measure", *TINY, "--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
        (["finetune", *TINY, "--data", "/nonexistent"], "does not exist"),
        (["finetune", *TINY, "--epochs", "0"], "epochs is 0"),
        (["finetune", *TINY, "--resume", "--out", "/nonexistent/run"], "nothing to resume"),
        (["finetune", *TINY, "--out", "/proc/run"], "cannot be written"),
    ],
)
def test_errors_are_one_paragraph(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["transmogrify"],
        ["plan"],
        ["convert", "test_vit"],
        ["measure", "test_vit", "--batch-size", "0"],
        ["plan", "test_vit", "--model-kwargs", "depth"],
        ["finetune", "test_vit", "--mixed-precision", "fp8"],
        ["finetune", "test_vit", "--ep", "3"],
    ],
)
def test_wrong_usage_is_two(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: revify" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(timm, "create_model", interrupted)
    assert "--resume" in fails(capsys, "plan", "test_vit", code=130)


def test_help_has_an_example_for_each_command_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "convert", "measure", "finetune"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        examples = [line.split() for line in lines if line.startswith(f"revify {command} ")]
        assert len(examples) >= 2
        for example in examples:
            assert make_parser().parse_args(example[1:]).command == command


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "revify", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"revify {revify.__version__}\n"


def test_convert_calibrates_on_images_and_says_how_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    words = [
        "convert",
        "test_vit",
        "--img-size",
        "32",
        "--out",
        str(file),
        "--num-classes",
        "10",
        "--calibrate",
        "digits",
    ]
    assert main([*words, "--images", "8", "--bits", "1", "--predictor", "diagonal"]) == 0
    out = capsys.readouterr().out
    assert "diagonal" in out
    assert re.search(r"converted and original agree on \d+\.\d% of 256 held-out images", out)
    stage = revify.load(file).revify_plan.stages[0]
    assert (stage.predictor, stage.bits) == ("diagonal", 1)
    assert stage.deviation is not None


def test_calibrated_predictors_without_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "test_vit", "--out", str(tmp_path / "m.safetensors"), "--predictor", "linear"]
    assert main(words) == 1
    assert "this is fitted on images" in capsys.readouterr().err
