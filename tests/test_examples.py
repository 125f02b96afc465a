"""The examples run, and what they print is what they promise."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed_by(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_your_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = printed_by("your_own_loop", capsys)
    assert "the plain VisionTransformer reads" in line
    assert int(line.partition("reads ")[2].partition("%")[0]) > 60


@pytest.mark.slow
def test_torchvision_models(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    lines = printed_by("torchvision_models", capsys)
    stages = {name: rest.split(",")[0] for name, _, rest in (line.partition(": stages ") for line in lines)}
    assert stages == {
        "resnet50": "2-3-5-2",
        "vit_b_16": "4",
        "swin_t": "2-2-6-2",
        "convnext_tiny": "3-3-9-3",
        "maxvit_t": "5-8",
        "efficientnet_v2_s": "2-3-3-5-8-14",
    }
    assert all(line.endswith("exact True, reverted True") for line in lines)


def test_handwritten_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed_by("handwritten_network", capsys) == [
        "the loop in the network: 6 blocks in one stage",
        "a block around each addition: 6 blocks in one stage",
    ]


def test_transformers_models(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    lines = printed_by("transformers_models", capsys)
    names = [line.partition(":")[0] for line in lines]
    assert names == ["ViT", "DINOv2", "CLIP", "BERT", "GPT-2", "Llama", "Whisper"]
    assert all(": 4 blocks, " in line for line in lines)
    assert all(line.endswith("exact True") for line in lines)


@pytest.mark.slow
def test_revnets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["revnets.py", "38", "56"])
    _, small, large, step = printed_by("revnets", capsys)
    assert small.split() == ["RevNet-38", "0.52", "M", "ResNet-32", "0.46", "M", "16"]
    assert large.split() == ["RevNet-56", "33.91", "M", "ResNet-50", "25.56", "M", "14"]
    assert step.startswith("one training step of RevNet-38: gradient of the stem ")


def test_diffusers_models(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    lines = printed_by("diffusers_models", capsys)
    assert [line.partition(",")[0] for line in lines] == [
        "UNet2DModel: 11 blocks in 3 stages",
        "UNet2DConditionModel: 20 blocks in 7 stages",
        "DiTTransformer2DModel: 4 blocks in 1 stages",
    ]
    assert all(line.endswith("exact True") for line in lines)


@pytest.mark.slow
def test_dense_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("torchvision")
    assert printed_by("dense_prediction", capsys) == [
        "fcn: stages 2-3-5-2, exact True",
        "unet: stages 3-3-5-2, exact True",
        "mask_rcnn: stages 2-3-5-2, exact True",
    ]
