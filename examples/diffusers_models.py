"""Diffusion networks of diffusers, by the recipe of IDM (Wang et al. 2025): U-Nets and a DiT.

Residual blocks of one width become reversible steps, with the time embedding, the text and the masks as side inputs; what
changes the width, the decoder with its skips above all, is checkpointed (transitions="checkpoint").

    pip install diffusers
    python examples/diffusers_models.py
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import revify

SIZES = {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 8}
TIME = torch.tensor([5, 7])


def networks() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Small ones, each with an example of its inputs by keyword."""
    image = torch.randn(2, 3, 16, 16)
    latent = torch.randn(2, 4, 16, 16)
    return {
        "UNet2DModel": (
            UNet2DModel(
                sample_size=16,
                layers_per_block=3,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                **SIZES,
            ),
            {"sample": image, "timestep": TIME},
        ),
        "UNet2DConditionModel": (
            UNet2DConditionModel(
                sample_size=16,
                cross_attention_dim=24,
                transformer_layers_per_block=3,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                **SIZES,
            ),
            {"sample": latent, "timestep": TIME, "encoder_hidden_states": torch.randn(2, 7, 24)},
        ),
        "DiTTransformer2DModel": (
            DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=4, sample_size=16
            ),
            {"hidden_states": latent, "timestep": TIME, "class_labels": torch.tensor([1, 2])},
        ),
    }


def gradients(model: nn.Module, inputs: dict[str, Tensor], *, plain: bool) -> list[Tensor]:
    """Of all parameters, after one step from one seed."""
    model.zero_grad()
    torch.manual_seed(0)
    with revify.plain_backward() if plain else nullcontext():
        model(**inputs).sample.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    torch.manual_seed(0)
    for name, (model, inputs) in networks().items():
        converted = revify.convert(model, inputs, method=revify.presets.idm)
        plan = converted.revify_plan
        found, expected = (gradients(converted, inputs, plain=plain) for plain in (False, True))
        exact = len(found) == len(expected) and all(map(torch.equal, found, expected))
        blocks = sum(len(stage.blocks) for stage in plan.stages)
        share = plan.predicted_bytes / plan.saved_bytes
        print(
            f"{name}: {blocks} blocks in {len(plan.stages)} stages, {len(plan.checkpointed)} modules checkpointed, "
            f"predicted peak {share:.0%} of what was saved, exact {exact}"
        )


if __name__ == "__main__":
    main()
