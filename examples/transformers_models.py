"""Models from Hugging Face transformers, built small: vision, BERT, GPT-2, Llama, CLIP, Whisper.

Their inputs have names, so the example is a dictionary. Masks and rotary embeddings are side inputs of the blocks and
pass through; caches must be off in training (`use_cache=False`), as always.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import revify

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
WHISPER = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}

IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32)}
TEXT = {"input_ids": torch.arange(20).view(2, 10), "attention_mask": (torch.arange(20) < 17).long().view(2, 10)}

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "ViT": (lambda: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=32, patch_size=8)), IMAGES),
    "DINOv2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION)), IMAGES),
    "CLIP": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)), IMAGES),
    "BERT": (lambda: hf.BertModel(hf.BertConfig(**SIZES, vocab_size=50)), TEXT),
    "GPT-2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=4, use_cache=False)),
        TEXT,
    ),
    "Llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2, use_cache=False)),
        TEXT,
    ),
    "Whisper": (
        lambda: WhisperEncoder(hf.WhisperConfig(**WHISPER, num_mel_bins=8, max_source_positions=10)),
        {"input_features": torch.randn(2, 8, 20)},
    ),
}


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """One backward from one seed (dropout draws random numbers)."""
    model.zero_grad()
    torch.manual_seed(1)
    model(**inputs)[0].square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    for name, (create, inputs) in MODELS.items():
        torch.manual_seed(0)
        converted = revify.convert(create().train(), inputs)
        with revify.plain_backward():
            expected = gradients(converted, inputs)
        exact = all(map(torch.equal, gradients(converted, inputs), expected))
        plan = converted.revify_plan
        print(f"{name}: {len(plan.stages[0].blocks)} blocks, {plan.stage_share:.0%} of the saved bytes, exact {exact}")


if __name__ == "__main__":
    main()
