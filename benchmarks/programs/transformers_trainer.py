"""transformers' Trainer with small networks from configurations: bf16, accumulation, clipping, saving and resuming.

python benchmarks/programs/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from comparing import Outcome, main, state
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import revify

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


class Rows(Dataset[dict[str, Tensor]]):
    """Random inputs, the same at every call.

    Args:
        kind: what a row has: "tokens", "classes" of tokens, "images" or "sounds".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        numbers = torch.Generator().manual_seed(index)
        ids = torch.randint(64, (12,), generator=numbers)
        label = torch.randint(3, (), generator=numbers)
        if self.kind == "images":
            return {"pixel_values": torch.randn(3, 32, 32, generator=numbers), "labels": label}
        if self.kind == "sounds":
            return {"input_features": torch.randn(8, 32, generator=numbers), "labels": label}
        return {"input_ids": ids, "labels": ids if self.kind == "tokens" else label}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)
    return transformers.Qwen3ForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=32)
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))


def vit() -> nn.Module:
    config = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**config, image_size=32, patch_size=8, num_labels=3, hidden_dropout_prob=0.1)
    )


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=16, dropout=0.1, num_labels=3, classifier_proj_size=16,
    )  # fmt: skip
    return transformers.WhisperForAudioClassification(config)


def train(make: Callable[[], nn.Module], rows: str, *, resume: bool = False, **arguments: Any) -> Outcome:
    """Train for six steps, with a break in the middle where it is to be resumed."""
    model = make()
    data = Rows(rows)
    example = {name: torch.stack([data[0][name], data[1][name]]) for name in data[0]}
    model = revify.convert(model, example)
    before = state(model, "before ")
    with tempfile.TemporaryDirectory() as folder:
        made = partial(
            TrainingArguments, output_dir=folder, per_device_train_batch_size=2, use_cpu=True, report_to="none", seed=3,
            learning_rate=1e-2, disable_tqdm=True, logging_strategy="no", save_strategy="steps", save_steps=3,
            lr_scheduler_type="cosine", warmup_steps=2, **arguments,
        )  # fmt: skip
        trainer = Trainer(model, made(max_steps=3 if resume else 6), train_dataset=data, eval_dataset=data)
        trainer.train()
        if resume:
            trainer = Trainer(revify.convert(make(), example), made(max_steps=6), train_dataset=data, eval_dataset=data)
            trainer.train(resume_from_checkpoint=str(Path(folder, "checkpoint-3")))
        loss = trainer.evaluate()["eval_loss"]
    return before | state(trainer.model) | {"loss": torch.tensor(loss)}


SETTINGS = {
    "Llama": partial(train, llama, "tokens"),
    "Llama, bf16, accumulation, resumed": partial(
        train, llama, "tokens", bf16=True, gradient_accumulation_steps=2, resume=True
    ),
    "Qwen3, bf16": partial(train, qwen3, "tokens", bf16=True),
    "GPT-2, dropout, resumed": partial(train, gpt2, "tokens", resume=True),
    "BERT, dropout, clipping": partial(train, bert, "classes", max_grad_norm=0.1),
    "ViT, dropout, bf16": partial(train, vit, "images", bf16=True),
    "Whisper's encoder, dropout": partial(train, whisper, "sounds"),
}

if __name__ == "__main__":
    main("transformers' Trainer", SETTINGS)
