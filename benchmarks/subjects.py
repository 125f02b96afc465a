"""Two networks that no method was tuned on, pretrained here since no weights of theirs come with PyPI packages.

A transformer that has read Python's standard library byte by byte, and learns the English of Python's own help; and a
small ConvNeXt that has learnt CIFAR-10, and learns the same images after poor JPEG files. Pretraining is plain, takes
about two minutes on one core, and is the same for every method and seed.
"""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from functools import cache
from pathlib import Path

import timm.scheduler
import torch
from timm.layers import Mlp
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional

LENGTH, WIDTH, DEPTH, BYTES = 128, 128, 8, 128


class Reading(nn.Module):
    """A pre-norm transformer block that sees what came before, x + attention, x + MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(WIDTH, num_heads=4, qkv_bias=True), Mlp(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), is_causal=True)
        return x + self.mlp(self.norm2(x))


class Reader(nn.Module):
    """Bytes [n, LENGTH] of 0…127 → logits of the byte that follows each, [n · LENGTH, 128]."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Reading() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def passages(text: str) -> tuple[Tensor, Tensor]:
    """Passages [n, LENGTH] of a text, and the bytes that follow, likewise."""
    values = torch.tensor(list(text.encode("ascii", "replace")))
    whole = (len(values) - 1) // LENGTH * LENGTH
    return values[:whole].view(-1, LENGTH), values[1 : whole + 1].view(-1, LENGTH)


def help_pages() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Passages of Python's help to learn from, and others to be judged on."""
    pages = [page for _, page in sorted(pydoc_data.topics.topics.items())]
    return passages("\n".join(pages[::3]))[:2], passages("\n".join(pages[1::3]))[:2]


@cache
def _read() -> dict[str, Tensor]:
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join(path.read_text("utf-8", "replace") for path in sorted(library.glob("*.py")))
    torch.manual_seed(0)
    model = Reader()
    _pretrain(model, *passages(text[:3_000_000]), steps=600, batch=32, rate=2e-3)
    return model.state_dict()


def reader() -> nn.Module:
    """The transformer that has read the standard library, in eval mode."""
    model = Reader()
    model.load_state_dict(_read())
    return model.eval()


def _small_convnext() -> nn.Module:
    return ConvNeXt(depths=(2, 2, 6, 2), dims=(24, 48, 96, 192), patch_size=2, num_classes=10)


@cache
def _seen(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = _small_convnext()
    _pretrain(model, images, labels, steps=900, batch=64, rate=2e-3)
    return model.state_dict()


def convnext(images: Tensor, labels: Tensor) -> nn.Module:
    """The ConvNeXt that has learnt these images [n, 3, 32, 32], in eval mode."""
    model = _small_convnext()
    model.load_state_dict(_seen(images, labels))
    return model.eval()


def _pretrain(model: nn.Module, images: Tensor, labels: Tensor, steps: int, batch: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=steps, t_in_epochs=False, warmup_t=steps // 10, warmup_lr_init=1e-6
    )
    for step in range(steps):
        schedule.step_update(step)
        rows = torch.randint(len(images), (batch,), generator=generator)
        functional.cross_entropy(model(images[rows]), labels[rows].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
