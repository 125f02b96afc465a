"""Real weights on real images: converted networks keep what they know, and their backward keeps every bit."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F
from asserts import assert_same, run
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor

import revify

pytestmark = pytest.mark.shared
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """act(x + f(x)); where the width changes, the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, outputs // inputs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-6n+2 for CIFAR-10 (He et al. 2016)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [BasicBlock(inputs if i == 0 else outputs, outputs) for i in range(n)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    model = CifarResNet(9)
    model.load_state_dict(load_file(SHARED / "weights/cifar10_resnet56.safetensors"))
    return model


def cifar(count: int) -> tuple[Tensor, Tensor]:
    """The first test images; sheets hold 25 rows of 40 images."""
    with zipfile.ZipFile(SHARED / "cifar10_10ktrain_5ktest.zip") as file:
        labels = torch.tensor(json.loads(file.read("labels.json"))["test"][:count])
        name = min(n for n in file.namelist() if n.startswith("test_"))
        sheet = pil_to_tensor(Image.open(io.BytesIO(file.read(name))).convert("RGB")).float() / 255
    images = sheet.unflatten(2, (40, 32)).unflatten(1, (25, 32)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return normalize(images[:count], MEAN, STD), labels


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def test_resnet_keeps_its_accuracy(resnet: nn.Module) -> None:
    images, labels = cifar(200)
    resnet.eval()
    original = accuracy(resnet, images, labels)
    assert original > 0.9
    converted = revify.convert(resnet, images[:2])
    assert [len(stage.blocks) for stage in converted.revify_plan.stages] == [9, 8, 8]
    assert accuracy(converted, images, labels) > original - 0.03
    assert accuracy(revify.revert(converted), images, labels) == original


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("bits", "autocast"), [(0, None), (2, torch.bfloat16), (4, None)])
@pytest.mark.sampled(3)
def test_resnet_gradients(resnet: nn.Module, bits: int, autocast: torch.dtype | None, training: bool) -> None:
    images, _ = cifar(8)
    converted = revify.convert(resnet, images, bits=bits).train(training)
    expected = run(converted, [images], plain=True, autocast=autocast)
    assert_same(run(converted, [images], autocast=autocast), expected)


@pytest.mark.parametrize(("bits", "autocast"), [(1, None), (4, torch.bfloat16)])
@pytest.mark.slow
def test_vit_gradients_and_features(bits: int, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True, drop_path_rate=0.1)
    weights = load_file(SHARED / "weights/vit_small_patch14_dinov2_fp16.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    images = F.interpolate(cifar(2)[0], size=(112, 112), mode="bicubic")
    converted = revify.convert(model, images, bits=bits)
    assert [len(stage.blocks) for stage in converted.revify_plan.stages] == [12]
    expected = run(converted, [images], plain=True, autocast=autocast)
    assert_same(run(converted, [images], autocast=autocast), expected)
    with torch.no_grad():
        wanted, found = model.eval()(images), converted.eval()(images)
    similarity = float(F.cosine_similarity(wanted, found).min())
    assert similarity > (0.99 if bits == 4 else 0.5)
