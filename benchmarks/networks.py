"""Residual networks that nobody here wrote: how each is made small, and which blocks a person would checkpoint.

`blocks` are regular expressions of module paths. Widths and images are tiny: what is compared is counted bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[Tensor, ...] | dict[str, Tensor]
Maker = Callable[[], tuple[nn.Module, Example]]


@dataclass(frozen=True)
class Network:
    """One network: `make` gives it and an example, `blocks` says what a person would checkpoint."""

    package: str
    name: str
    make: Maker
    blocks: tuple[str, ...]


def images(size: int = 32, batch: int = 1, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.rand(batch, channels, size, size),)


def network(
    package: str,
    name: str,
    module: str,
    blocks: str | tuple[str, ...],
    inputs: Any = None,
    cls: str = "",
    **options: Any,
) -> Network:
    """A class of a module with these options."""

    def make() -> tuple[nn.Module, Example]:
        kind = getattr(importlib.import_module(module), cls or name)
        model: nn.Module = kind(**options)
        return model, (inputs or images)()

    return Network(package, name, make, (blocks,) if isinstance(blocks, str) else blocks)


def _spandrel(
    name: str, module: str, blocks: str | tuple[str, ...], inputs: Any = None, cls: str = "", **options: Any
) -> Network:
    extra = module.split(".")[0] in ("SRFormer", "Restormer", "MPRNet", "M3SNet", "MIRNet2")
    package = "spandrel_extra_arches" if extra else "spandrel"
    return network("spandrel", name, f"{package}.architectures.{module}", blocks, inputs, cls, **options)


WINDOWS = {"img_size": 32, "embed_dim": 24, "depths": [6, 6, 6], "num_heads": [2, 2, 2], "window_size": 8}
GROUPED = {"img_size": 32, "embed_dim": 24, "depth": [4, 4, 4], "num_heads": [2, 2, 2]}

SPANDREL = (
    _spandrel("SwinIR", "SwinIR.__arch.SwinIR", r"layers\.\d+\.residual_group\.blocks\.\d+", **WINDOWS),
    _spandrel("Swin2SR", "Swin2SR.__arch.Swin2SR", r"layers\.\d+\.residual_group\.blocks\.\d+", **WINDOWS),
    _spandrel("HAT", "HAT.__arch.HAT", r"layers\.\d+\.residual_group\.blocks\.\d+", squeeze_factor=8, **WINDOWS),
    _spandrel("SRFormer", "SRFormer.__arch.SRFormer", r"layers\.\d+\.residual_group\.blocks\.\d+", **WINDOWS),
    _spandrel(
        "DAT", "DAT.__arch.DAT", r"layers\.\d+\.blocks\.\d+", lambda: images(batch=2), split_size=[4, 8], **GROUPED
    ),
    _spandrel("RGT", "RGT.__arch.rgt", r"layers\.\d+\.blocks\.\d+", split_size=[4, 8], **GROUPED),
    _spandrel("ATD", "ATD.__arch.atd_arch", r"layers\.\d+\.residual_group\.layers\.\d+", **WINDOWS),
    _spandrel(
        "GRL",
        "GRL.__arch.grl",
        r"layers\.\d+\.blocks\.\d+",
        img_size=32,
        embed_dim=24,
        depths=[4, 4, 4],
        num_heads_window=[2, 2, 2],
        num_heads_stripe=[2, 2, 2],
        window_size=8,
    ),
    _spandrel("DRCT", "DRCT.__arch.drct_arch", r"layers\.\d+\.swin\d+", **{**WINDOWS, "gc": 8, "embed_dim": 24}),
    _spandrel("CRAFT", "CRAFT.__arch.CRAFT", r"layers\.\d+\.residual_group\.(shift_)?(hf_)?blocks\.\d+", embed_dim=24),
    _spandrel("FDAT", "FDAT.__arch.fdat", r"groups\.\d+\.blocks\.\d+", embed_dim=24, num_heads=2, mid_dim=16),
    _spandrel(
        "DITN", "DITN.__arch.DITN_Real", r"UFONE_body\.\d+\.[IS]\w+\.\d+", cls="DITN_Real", dim=24, UFONE_blocks=3
    ),
    _spandrel("MoESR", "MoESR.__arch.MoESR", r"blocks\.\d+\.blocks\.\d+", dim=16, n_blocks=4),
    _spandrel(
        "SAFMN-BCIE",
        "SAFMNBCIE.__arch.safmn_bcie",
        r"feats\.\d+\.\w+\.\d+",
        cls="SAFMN_BCIE",
        dim=24,
        n_blocks=4,
        num_layers=4,
    ),
    _spandrel(
        "RCAN",
        "RCAN.__arch.rcan_arch",
        r"body\.\d+\.body\.\d+",
        n_resgroups=3,
        n_resblocks=6,
        n_feats=16,
        rgb_range=1,
        norm=False,
    ),
    _spandrel("RealPLKSR", "PLKSR.__arch.RealPLKSR", r"feats\.\d+", dim=16, n_blocks=12),
    _spandrel("PLKSR", "PLKSR.__arch.PLKSR", r"feats\.\d+", dim=16, n_blocks=12),
    _spandrel("MoSR", "MoSR.__arch.mosr_arch", r"gblocks\.\d+", n_block=12, dim=16),
    _spandrel("SPAN", "SPAN.__arch.span", r"block_\d+", num_in_ch=3, num_out_ch=3, feature_channels=16),
    _spandrel(
        "ESRGAN", "ESRGAN.__arch.RRDB", r"model\.1\.sub\.\d+\.RDB\d", cls="RRDBNet", num_filters=16, num_blocks=5
    ),
    _spandrel(
        "OmniSR",
        "OmniSR.__arch.OmniSR",
        r"residual_layer\.\d+\.residual_layer\.\d+",
        num_feat=16,
        res_num=4,
        block_num=2,
    ),
    _spandrel("Restormer", "Restormer.__arch.restormer_arch", r"\w+\.\d+", dim=12, num_blocks=[2, 2, 2, 3]),
    _spandrel("Uformer", "Uformer.__arch.Uformer", r"\w+\.blocks\.\d+", lambda: images(128), img_size=128, embed_dim=8),
    _spandrel(
        "NAFNet",
        "NAFNet.__arch.NAFNet_arch",
        r"(encoders\.\d+|middle_blks|decoders\.\d+)\.?\d*",
        width=8,
        middle_blk_num=6,
        enc_blk_nums=[2, 2, 4],
        dec_blk_nums=[2, 2, 2],
    ),
    _spandrel("SCUNet", "SCUNet.__arch.SCUNet", r"m_\w+\.\d+", lambda: images(64), dim=16, input_resolution=64),
    _spandrel(
        "RetinexFormer",
        "RetinexFormer.__arch.retinexformer_arch",
        r".*\.blocks\.\d+\.\d+",
        n_feat=8,
        num_blocks=[2, 4, 4],
    ),
    _spandrel(
        "MPRNet",
        "MPRNet.__arch.MPRNet",
        r".*(encoder_level|decoder_level|body)\w*\.\d+",
        n_feat=8,
        scale_unetfeats=4,
        scale_orsnetfeats=4,
    ),
    _spandrel("SAFMN", "SAFMN.__arch.safmn", r"feats\.\d+", dim=24, n_blocks=8),
    _spandrel("SeemoRe", "SeemoRe.__arch.seemore_arch", r"body\.\d+\.\w+", embedding_dim=16),
    _spandrel(
        "KBNet",
        "KBNet.__arch.kbnet_s",
        r"(encoders\.\d+|middle_blks|decoders\.\d+)\.?\d*",
        cls="KBNet_s",
        width=8,
        middle_blk_num=4,
        enc_blk_nums=[2, 2, 2, 2],
    ),
    _spandrel("MixDehazeNet", "MixDehazeNet.__arch.MixDehazeNet", r"layer\d\.blocks\.\d+", depths=[2, 2, 4, 2, 2]),
    _spandrel("DCTLSA", "DCTLSA.__arch.dctlsa", r"\w+\.\d+", nf=20, num_head=5),
    _spandrel("FBCNN", "FBCNN.__arch.FBCNN", r"m_\w+\.\d+", nc=[8, 16, 24, 32]),
)

_VIT = {"dim": 48, "depth": 8, "heads": 3, "mlp_dim": 96}
_IMAGE = {"image_size": 32, "patch_size": 4, "num_classes": 10}


def _vit(
    name: str, module: str, blocks: str | tuple[str, ...], inputs: Any = None, cls: str = "", **options: Any
) -> Network:
    return network("vit-pytorch", name, f"vit_pytorch.{module}", blocks, inputs, cls, **options)


LAYER = r"transformer\.layers\.\d+\.[01]"
VIT_PYTORCH = (
    _vit("ViT", "vit", LAYER, **_IMAGE, **_VIT),
    _vit("SimpleViT", "simple_vit", LAYER, **_IMAGE, **_VIT),
    _vit(
        "CaiT", "cait", r"(patch|cls)_transformer\.layers\.\d+\.[01]", **_IMAGE, **_VIT, cls_depth=2, layer_dropout=0.0
    ),
    _vit("XCiT", "xcit", r"\w+\.layers\.\d+\.\d", **_IMAGE, **_VIT, cls_depth=2),
    _vit("DeepViT", "deepvit", LAYER, **_IMAGE, **_VIT),
    _vit(
        "ViT3D",
        "vit_3d",
        LAYER,
        lambda: (torch.rand(1, 3, 4, 32, 32),),
        cls="ViT",
        image_size=32,
        frames=4,
        image_patch_size=8,
        frame_patch_size=2,
        num_classes=10,
        **_VIT,
    ),
    _vit(
        "ViViT",
        "vivit",
        r"\w+_transformer\.layers\.\d+\.[01]",
        lambda: (torch.rand(1, 3, 8, 32, 32),),
        image_size=32,
        frames=8,
        image_patch_size=8,
        frame_patch_size=2,
        num_classes=10,
        dim=48,
        spatial_depth=4,
        temporal_depth=4,
        heads=3,
        mlp_dim=96,
    ),
    _vit("SimpleUViT", "simple_uvit", LAYER + r"|transformer\.layers\.\d+\.\d+\.\d+", **_IMAGE, **_VIT),
    _vit("QKNormViT", "simple_vit_with_qk_norm", LAYER, cls="SimpleViT", **_IMAGE, **_VIT),
    _vit("ValueResidualViT", "simple_vit_with_value_residual", LAYER, cls="SimpleViT", **_IMAGE, **_VIT),
    _vit("ParallelViT", "parallel_vit", LAYER, cls="ViT", **_IMAGE, **_VIT),
    _vit(
        "MaxViT",
        "max_vit",
        r"layers\.\d+\.\d+",
        lambda: images(64),
        num_classes=10,
        dim_conv_stem=16,
        dim=16,
        dim_head=8,
        depth=(2, 2),
        window_size=4,
    ),
    _vit("RvT", "rvt", LAYER, **_IMAGE, **_VIT),
    _vit(
        "CCT",
        "cct",
        r"classifier\.blocks\.\d+\.[0-3]",
        lambda: images(32),
        img_size=32,
        embedding_dim=48,
        n_conv_layers=1,
        kernel_size=3,
        stride=1,
        padding=1,
        num_layers=8,
        num_heads=3,
        mlp_ratio=2.0,
        num_classes=10,
        positional_embedding="learnable",
    ),
    _vit(
        "PiT",
        "pit",
        r"layers\.\d+\.layers\.\d+\.[01]",
        lambda: images(32),
        image_size=32,
        patch_size=4,
        num_classes=10,
        dim=48,
        depth=(3, 3),
        heads=3,
        mlp_dim=96,
    ),
    _vit(
        "CvT",
        "cvt",
        r"layers\.\d+\.2\.layers\.\d+\.[01]",
        lambda: images(64),
        num_classes=10,
        s1_emb_dim=16,
        s2_emb_dim=32,
        s3_emb_dim=48,
        s3_depth=4,
    ),
    _vit(
        "CrossFormer",
        "crossformer",
        r"layers\.\d+\.1\.layers\.\d+\.\d",
        lambda: images(224),
        num_classes=10,
        dim=(16, 16, 32, 32),
        depth=(1, 1, 2, 1),
    ),
    _vit(
        "TwinsSVT",
        "twins_svt",
        r"layers\.\d+\.\d+\.layers\.\d+\.\d",
        lambda: images(64),
        num_classes=10,
        s1_emb_dim=16,
        s2_emb_dim=16,
        s3_emb_dim=32,
        s4_emb_dim=32,
        s3_depth=4,
    ),
    _vit(
        "RegionViT",
        "regionvit",
        r"layers\.\d+\.\d+\.layers\.\d+\.\d",
        lambda: images(224),
        dim=(16, 16, 32, 32),
        depth=(2, 2, 2, 2),
        window_size=7,
        num_classes=10,
    ),
    _vit(
        "SepViT",
        "sep_vit",
        r"layers\.\d+\.\d+\.layers\.\d+\.\d",
        lambda: images(224),
        num_classes=10,
        dim=16,
        dim_head=8,
        heads=(1, 2, 2, 4),
        depth=(1, 2, 4, 2),
    ),
    _vit(
        "ScalableViT",
        "scalable_vit",
        r"layers\.\d+\.0\.layers\.\d+\.\d",
        lambda: images(128),
        num_classes=10,
        dim=16,
        heads=(1, 1, 2, 2),
        depth=(2, 2, 4, 2),
        ssa_dim_key=(8, 8, 8, 8),
        reduction_factor=(4, 2, 2, 1),
        window_size=(4, 4, None, None),
    ),
    _vit("LocalViT", "local_vit", LAYER, **_IMAGE, **_VIT),
    _vit(
        "NesT",
        "nest",
        r"layers\.\d+\.0\.layers\.\d+\.\d",
        lambda: images(32),
        image_size=32,
        patch_size=4,
        num_classes=10,
        dim=24,
        heads=2,
        num_hierarchies=3,
        block_repeats=(2, 2, 3),
    ),
    _vit(
        "MobileViT",
        "mobile_vit",
        r"(stem|trunk)\.\d+\.?\d*",
        lambda: images(64),
        image_size=(64, 64),
        dims=[24, 32, 40],
        channels=[8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64],
        num_classes=10,
    ),
    _vit(
        "CrossViT",
        "cross_vit",
        r".*\.layers\.\d+\.[01]",
        lambda: images(96),
        image_size=96,
        num_classes=10,
        sm_dim=32,
        lg_dim=48,
        depth=2,
        sm_enc_depth=2,
        lg_enc_depth=3,
        cross_attn_depth=2,
    ),
)

NETWORKS = (*SPANDREL, *VIT_PYTORCH)
