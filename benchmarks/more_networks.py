"""Networks of transformers, diffusers, x-transformers, monai, torch_geometric, open_clip and torchvision, made small.

As in `networks`: how each is made, and which blocks a person would checkpoint.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from networks import Example, Network, images, network
from torch import nn

LAYERS = r"(.*\.)?(layer|layers|h|block|blocks|albert_layers|resblocks)\.\d+"
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 120,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "head_dim": 12,
    "num_key_value_heads": 2,
}


def tokens(length: int = 64, batch: int = 2) -> Example:
    return {"input_ids": torch.randint(3, 100, (batch, length))}


def both() -> Example:
    return {**tokens(32), "decoder_input_ids": torch.randint(3, 100, (2, 32))}


def pixels(size: int = 32) -> Example:
    return {"pixel_values": torch.rand(2, 3, size, size)}


def sound() -> Example:
    return {"input_values": torch.randn(1, 4000)}


def _hf(kind: str, inputs: Any = tokens, blocks: str = LAYERS, cls: str = "AutoModel", **options: Any) -> Network:
    """A network of transformers from a small configuration."""

    def make() -> tuple[nn.Module, Example]:
        transformers = importlib.import_module("transformers")
        plain = {} if "depths" in options else TEXT  # else of several widths
        config = transformers.AutoConfig.for_model(kind, **{**plain, **options})
        auto = getattr(transformers, cls)
        model: nn.Module = auto.from_config(config) if cls.startswith("Auto") else auto(config)
        return model, inputs()

    return Network("transformers", kind + ("" if cls == "AutoModel" else f" {cls}"), make, (blocks,))


_GPT2 = {"n_embd": 48, "n_layer": 6, "n_head": 4, "n_positions": 128}
_SEQ = {
    "d_model": 48, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1,
}  # fmt: skip
_IMAGE = {"image_size": 32, "patch_size": 4, "num_labels": 3}
_SOUND = {
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip
_STAGED = {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 4, 2], "embedding_size": 16, "layer_type": "basic"}

LANGUAGE = (
    *(_hf(kind) for kind in ("bert", "roberta", "electra", "albert", "mpnet", "megatron-bert", "roformer", "rembert")),
    *(_hf(kind) for kind in ("convbert", "nystromformer", "ernie", "layoutlm", "splinter", "camembert", "fnet")),
    _hf("distilbert", dim=48, n_layers=6, n_heads=4, hidden_dim=96),
    _hf("deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0),
    _hf("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0),
    _hf("mobilebert", embedding_size=24, intra_bottleneck_size=24, num_feedforward_networks=2),
    _hf("squeezebert", embedding_size=48, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2),
    _hf("big_bird", attention_type="original_full"),
    _hf("esm", position_embedding_type="rotary", token_dropout=False, mask_token_id=3),
    _hf("gpt2", **_GPT2),
    _hf("gpt_neo", num_layers=6, attention_types=[[["global", "local"], 3]], num_heads=4),
    _hf("gpt_neox", rotary_pct=0.5),
    _hf("gptj", rotary_dim=8, **_GPT2),
    _hf("codegen", rotary_dim=8, **_GPT2),
    _hf("opt", ffn_dim=96, word_embed_proj_dim=48),
    _hf("bloom", n_layer=6, n_head=4),
    _hf("xglm", d_model=48, num_layers=6, attention_heads=4, ffn_dim=96),
    *(_hf(kind) for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3")),
    *(_hf(kind) for kind in ("starcoder2", "olmo", "olmo2", "cohere", "granite", "glm", "persimmon")),
    *(_hf(kind) for kind in ("helium", "nemotron", "smollm3", "arcee", "ministral", "exaone4", "seed_oss")),
    _hf(
        "stablelm",
        num_key_value_heads=4,
        hidden_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    _hf("mixtral", num_local_experts=2, num_experts_per_tok=1),
    _hf("mamba", state_size=4, expand=2),
    _hf("rwkv", attention_hidden_size=48, context_length=128),
    _hf("t5", both, d_model=48, d_kv=12, d_ff=96, num_layers=4, num_heads=4, decoder_start_token_id=0),
    *(_hf(kind, both, **_SEQ) for kind in ("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot")),
)

VISION = (
    *(_hf(kind, pixels, **_IMAGE) for kind in ("vit", "deit", "beit", "dinov2", "vit_msn", "ijepa", "data2vec-vision")),
    _hf("clip_vision_model", pixels, **_IMAGE),
    _hf("siglip_vision_model", pixels, **_IMAGE),
    _hf("swin", pixels, embed_dim=24, depths=[2, 2, 4], num_heads=[2, 2, 3], window_size=4, image_size=32, patch_size=2),
    _hf("swinv2", pixels, embed_dim=24, depths=[2, 2, 4], num_heads=[2, 2, 3], window_size=4, image_size=32, patch_size=2),
    _hf("convnext", lambda: pixels(64), hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 4, 2]),
    _hf("convnextv2", lambda: pixels(64), hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 4, 2]),
    _hf("resnet", pixels, **_STAGED),
    _hf("regnet", pixels, groups_width=8, **{**_STAGED, "layer_type": "y"}),
    _hf("poolformer", lambda: pixels(64), r".*block\.\d+\.\d+", hidden_sizes=[16, 24, 32, 48], depths=[2, 2, 4, 2]),
    _hf("segformer", lambda: pixels(64), r".*blocks\.\d+", hidden_sizes=[16, 24, 32, 48], depths=[2, 2, 4, 2],
        num_attention_heads=[1, 1, 2, 2]),
    _hf("pvt_v2", lambda: pixels(64), hidden_sizes=[16, 24, 32, 48], depths=[2, 2, 4, 2], num_attention_heads=[1, 1, 2, 2]),
    _hf("focalnet", pixels, embed_dim=16, depths=[3, 3], image_size=32, patch_size=2, focal_levels=[2, 2],
        focal_windows=[3, 3]),
    _hf("hiera", lambda: pixels(64), image_size=[64, 64], embed_dim=16, depths=[2, 2, 3, 2], num_heads=[1, 2, 4, 8]),
    _hf("yolos", pixels, num_detection_tokens=4, image_size=[32, 32], patch_size=4),
)  # fmt: skip

AUDIO = (
    *(_hf(kind, sound, **_SOUND) for kind in ("wav2vec2", "hubert", "wavlm", "unispeech", "data2vec-audio")),
    _hf("audio-spectrogram-transformer", lambda: {"input_values": torch.randn(1, 64, 32)}, max_length=64, num_mel_bins=32),
    _hf("whisper", lambda: {"input_features": torch.randn(1, 16, 128), "decoder_input_ids": torch.randint(3, 90, (1, 16))},
        **_SEQ, num_mel_bins=16, max_source_positions=64, max_target_positions=32),
)  # fmt: skip


def _xt(name: str, cls: str = "Decoder", **options: Any) -> Network:
    """A language model, or encoder, of x-transformers."""

    def make() -> tuple[nn.Module, Example]:
        package = importlib.import_module("x_transformers")
        layers = getattr(package, cls)(dim=48, depth=6, heads=4, attn_dim_head=12, **options)
        return package.TransformerWrapper(num_tokens=100, max_seq_len=64, attn_layers=layers), (
            torch.randint(0, 100, (2, 64)),
        )

    return Network("x-transformers", name, make, (r"attn_layers\.layers\.\d+\.1",))


X_TRANSFORMERS = (
    _xt("Decoder"),
    _xt("Encoder", "Encoder"),
    _xt("post-norm", "Encoder", pre_norm=False),
    _xt("rotary, RMSNorm", use_rmsnorm=True, rotary_pos_emb=True),
    _xt("GLU, ALiBi", ff_glu=True, alibi_pos_bias=True),
    _xt("gated residual", gate_residual=True),
    _xt("sandwich", sandwich_norm=True),
    _xt("scaled residual", scale_residual=True),
    _xt("macaron", macaron=True),
    _xt("shift tokens", shift_tokens=1),
)


def _sample(name: str, cls: str, blocks: str, inputs: Any, **options: Any) -> Network:
    return network("diffusers", name, "diffusers", blocks, inputs, cls, **options)


def _latents() -> Example:
    return {"sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3])}


def _conditioned() -> Example:
    return {**_latents(), "encoder_hidden_states": torch.randn(1, 8, 32)}


DIFFUSERS = (
    _sample("UNet2D", "UNet2DModel", r".*(resnets|attentions)\.\d+", _latents, sample_size=16, in_channels=4, out_channels=4,
            layers_per_block=3, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
    _sample("UNet2DCondition", "UNet2DConditionModel", r".*(resnets|attentions)\.\d+", _conditioned, sample_size=16,
            layers_per_block=2, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8, cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
    _sample("DiT", "DiTTransformer2DModel", r"transformer_blocks\.\d+",
            lambda: {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3]),
                     "class_labels": torch.tensor([1])},
            num_attention_heads=4, attention_head_dim=12, in_channels=4, num_layers=6, sample_size=16, norm_num_groups=4),
    _sample("PixArt", "PixArtTransformer2DModel", r"transformer_blocks\.\d+",
            lambda: {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3]),
                     "encoder_hidden_states": torch.randn(1, 8, 48)},
            num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=6, sample_size=16,
            norm_num_groups=4, cross_attention_dim=48, caption_channels=48, use_additional_conditions=False),
    _sample("SD3", "SD3Transformer2DModel", r"transformer_blocks\.\d+",
            lambda: {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3]),
                     "encoder_hidden_states": torch.randn(1, 8, 32), "pooled_projections": torch.randn(1, 16)},
            num_attention_heads=4, attention_head_dim=12, in_channels=4, num_layers=6, sample_size=16, out_channels=4,
            joint_attention_dim=32, caption_projection_dim=48, pooled_projection_dim=16, pos_embed_max_size=16),
    _sample("AutoencoderKL", "AutoencoderKL", r".*resnets\.\d+", lambda: images(32), block_out_channels=(16, 32),
            layers_per_block=3, norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2),
    _sample("VQModel", "VQModel", r".*resnets\.\d+", lambda: images(32), block_out_channels=(16, 32), layers_per_block=3,
            norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
)  # fmt: skip


def _monai(name: str, blocks: str, inputs: Any, cls: str = "", **options: Any) -> Network:
    return network("monai", name, "monai.networks.nets", blocks, inputs, cls, **options)


def volume(size: int = 32, channels: int = 1) -> Example:
    return (torch.randn(1, channels, size, size, size),)


MONAI = (
    _monai("SegResNet", r".*\.\d+\.[12]", volume, init_filters=8, blocks_down=(2, 3, 3), blocks_up=(1, 1)),
    _monai("UNet", r".*unit\d", lambda: volume(32), spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32),
           strides=(2, 2), num_res_units=3),
    _monai("UNETR", LAYERS, lambda: volume(32), in_channels=1, out_channels=2, img_size=32, feature_size=8, hidden_size=48,
           mlp_dim=96, num_heads=4),
    _monai("SwinUNETR", r"swinViT\.layers\d\.0\.blocks\.\d", lambda: volume(64), in_channels=1, out_channels=2,
           feature_size=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4)),
    _monai("ViT", LAYERS, lambda: volume(32), in_channels=1, img_size=32, patch_size=8, hidden_size=48, mlp_dim=96,
           num_layers=6, num_heads=4),
    _monai("ResNet", r"layer\d\.\d", lambda: volume(32), block="basic", layers=[2, 2, 2, 2], block_inplanes=[8, 8, 16, 16],
           n_input_channels=1, num_classes=2, spatial_dims=3),
    _monai("DynUNet", r"\w+(s|block)\.\d|\w*block", lambda: volume(32), spatial_dims=3, in_channels=1, out_channels=2,
           kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[8, 16, 32], res_block=True),
    _monai("VNet", r".*ops\.\d", lambda: volume(32), spatial_dims=3, in_channels=1, out_channels=2),
    _monai("DiffusionModelUNet", r".*(resnets|attentions)\.\d+",
           lambda: (torch.randn(1, 1, 32, 32), torch.tensor([3])), spatial_dims=2, in_channels=1, out_channels=1,
           channels=(16, 32), attention_levels=(False, True), num_res_blocks=3, num_head_channels=8, norm_num_groups=8),
    _monai("AutoencoderKL", r".*blocks\.\d+", lambda: (torch.randn(1, 1, 32, 32),), spatial_dims=2, in_channels=1,
           out_channels=1, channels=(16, 32), num_res_blocks=3, attention_levels=(False, False), norm_num_groups=8,
           latent_channels=4),
    _monai("MedNeXt", r".*(blocks\.\d|bottleneck)\.\d+", lambda: volume(32), spatial_dims=3, init_filters=8,
           in_channels=1, out_channels=2, blocks_down=(3, 3), blocks_bottleneck=3, blocks_up=(3, 3)),
    _monai("HighResNet", r"blocks\.\d+", lambda: volume(24), spatial_dims=3, in_channels=1, out_channels=2),
)  # fmt: skip


def _graph() -> Example:
    return torch.randn(200, 32), torch.randint(0, 200, (2, 600))


def _pyg(
    name: str, blocks: str = r"convs\.\d+", module: str = "torch_geometric.nn", inputs: Any = _graph, **o: Any
) -> Network:
    return network("torch_geometric", name, module, blocks, inputs, **o)


def everyone(places: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A graph in which every atom is a neighbour of every other."""
    edges = (1 - torch.eye(len(places))).nonzero().T
    return edges, (places[edges[0]] - places[edges[1]]).norm(dim=-1)


class DeeperGCN(nn.Module):
    """The example of torch_geometric: DeepGCNLayer of GENConv, pre-activation with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import DeepGCNLayer, GENConv

        def layer() -> nn.Module:
            conv = GENConv(32, 32, aggr="softmax", t=1.0, learn_t=True, num_layers=2, norm="layer")
            return DeepGCNLayer(conv, nn.LayerNorm(32), nn.ReLU(inplace=True), block="res+", dropout=0.1)

        self.layers = nn.ModuleList(layer() for _ in range(8))

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, edges)
        return x


TORCH_GEOMETRIC = (
    Network("torch_geometric", "DeeperGCN", lambda: (DeeperGCN(), _graph()), (r"layers\.\d+",)),
    _pyg("SchNet", r"interactions\.\d+", "torch_geometric.nn.models",
         lambda: (torch.randint(1, 9, (40,)), torch.randn(40, 3) * 3), hidden_channels=32, num_filters=32,
         num_interactions=6, interaction_graph=everyone),
    _pyg("GCN", hidden_channels=32, in_channels=32, num_layers=6),
)  # fmt: skip


def _clip(name: str, **vision: Any) -> Network:
    def make() -> tuple[nn.Module, Example]:
        package = importlib.import_module("open_clip.model")
        text = package.CLIPTextCfg(context_length=16, vocab_size=100, width=48, heads=4, layers=4)
        model = package.CLIP(48, {"image_size": 32, "patch_size": 4, **vision}, text)
        return model, (*images(32, 2), torch.randint(0, 100, (2, 16)))

    return Network("open_clip", name, make, (r".*resblocks\.\d+|visual\.layer\d\.\d+",))


OPEN_CLIP = (
    _clip("ViT", width=48, layers=6, head_width=12),
    _clip("ViT, LayerScale", width=48, layers=6, head_width=12, ls_init_value=0.1),
    _clip("ModifiedResNet", width=16, layers=[3, 3, 3, 3]),
)


def _torchvision(name: str, blocks: str, inputs: Any = None, **options: Any) -> Network:
    return network("torchvision", name, "torchvision.models", blocks, inputs or (lambda: images(64, 2)), **options)


TORCHVISION = (
    _torchvision("resnet18", r"layer\d\.\d"),
    _torchvision("resnext50_32x4d", r"layer\d\.\d"),
    _torchvision("regnet_y_400mf", r"trunk_output\.block\d\.\S+"),
    _torchvision("mobilenet_v3_small", r"features\.\d+"),
    _torchvision("efficientnet_b0", r"features\.\d+\.\d+"),
    _torchvision("convnext_tiny", r"features\.\d+\.\d+"),
    _torchvision("vit_b_32", r"encoder\.layers\.encoder_layer_\d+", image_size=64),
    _torchvision("swin_t", r"features\.\d+\.\d+"),
    _torchvision("maxvit_t", r"blocks\.\d+\.layers\.\d+", lambda: images(224, 1)),
    _torchvision("densenet121", r"features\.denseblock\d\.\w+"),
)

MORE = (
    *LANGUAGE,
    *VISION,
    *AUDIO,
    *X_TRANSFORMERS,
    *DIFFUSERS,
    *MONAI,
    *TORCH_GEOMETRIC,
    *OPEN_CLIP,
    *TORCHVISION,
)
