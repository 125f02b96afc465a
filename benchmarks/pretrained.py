"""The real networks and images of ../shared/data, as the benchmarks use them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """act(shortcut(x) + bn(conv(act(bn(conv(x)))))), with a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """CIFAR ResNet of depth 6n+2 with widths 16, 32, 64."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(BasicBlock(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(BasicBlock(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(blocks)))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int) -> nn.Module:
    """ResNet-20 or -56 with its CIFAR-10 weights, in eval mode."""
    model = CifarResNet(depth)
    model.load_state_dict(load_file(DATA / "weights" / f"cifar10_resnet{depth}.safetensors"))
    return model.eval()


def vit_small() -> nn.Module:
    """timm's ViT-S/14 with its DINOv2-initialised weights, in eval mode, for images of 224."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
    weights = load_file(DATA / "weights" / "vit_small_patch14_dinov2_fp16.safetensors")
    model.load_state_dict({name: w.float() for name, w in weights.items()})
    return model.eval()


def cifar10(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images [n, 3, 32, 32] and labels [n] of CIFAR-10, split "train" or "test"."""
    images, labels = _loaders().cifar10(DATA / "cifar10_10ktrain_5ktest.zip", split)
    x = torch.from_numpy(images[:count].astype(np.float32) / 255).permute(0, 3, 1, 2)
    return normalised(x), torch.from_numpy(labels[:count].astype(np.int64))


def flowers(split: str, size: int = 224) -> tuple[Tensor, Tensor]:
    """Normalised, centre-cropped photos [n, 3, size, size] and labels [n], split "train" or "val"."""
    items, _ = _loaders().flowers(DATA / "flowers5_224.zip", split)
    images = []
    for image, _label in items:
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        crop = image.crop((left, top, left + 224, top + 224)).resize((size, size))
        images.append(torch.from_numpy(np.asarray(crop, np.float32) / 255).permute(2, 0, 1))
    return normalised(torch.stack(images)), torch.tensor([label for _, label in items])


def normalised(images: Tensor) -> Tensor:
    """Images in 0…1 → zero mean and unit variance in ImageNet's sense."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _loaders() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_data", DATA / "load_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
