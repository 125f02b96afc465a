"""Fine-tune a converted timm model on handwritten digits, and hand the plain model on.

    python examples/finetune_digits.py

The converted model trains in a fraction of the memory. What comes out is an ordinary timm checkpoint: whoever uses it
needs neither revify nor to know of it. Takes about a minute on two CPU cores.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import timm
import torch
from rich.console import Console

from revify.finetuning import finetune
from revify.finetuning.data import open_data
from revify.finetuning.progress import ConsoleProgress
from revify.finetuning.recipe import Recipe
from revify.finetuning.results import Result


def main(model: str, epochs: int, out: Path) -> Result:
    recipe = Recipe(model=model, img_size=32, epochs=epochs, out=out)
    result = finetune(recipe, ConsoleProgress(Console(stderr=True)))

    # From here on it is timm alone.
    plain = timm.create_model(model, img_size=32, num_classes=10, checkpoint_path=out / "plain.safetensors").eval()
    config = timm.data.resolve_data_config({"input_size": (3, 32, 32), "crop_pct": 1.0}, model=plain)
    transform = timm.data.create_transform(**config)

    digits = open_data("digits", channels=3).validation
    hits = 0
    with torch.no_grad():
        for picture, target in digits.samples:
            images = transform(picture.convert("RGB")).unsqueeze(0)
            hits += int(plain(images).argmax(1) == target)
    print(f"\nthe plain model, by timm alone: {hits} of {len(digits)} digits read rightly")
    assert hits == round(len(digits) * (result.outcome("reverted").accuracy or 0))
    return result


if __name__ == "__main__":
    model, epochs = (sys.argv[1:] or ["xcit_nano_12_p8_224"])[0], int((sys.argv[2:] or ["3"])[0])
    with tempfile.TemporaryDirectory() as folder:
        main(model, epochs, Path(folder) / "run")
