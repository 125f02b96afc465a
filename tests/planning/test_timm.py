"""timm's own small test models, as they are: the same bits in both backwards, with what timm draws and counts."""

from __future__ import annotations

import pytest
import timm
import torch
from asserts import assert_same, assert_same_gradients, run

import revify

SETTINGS = {
    "test_vit": {"img_size": 64, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3},
    "test_vit2": {"img_size": 64},
    "test_vit3": {"img_size": 64, "drop_path_rate": 0.1},
    "test_vit4": {"img_size": 64},
    "test_vit_relpos": {"img_size": 64},
    "test_convnext": {"drop_path_rate": 0.3},
    "test_mambaout": {"drop_path_rate": 0.3},
    "test_maxvit": {"img_size": 160},
}
NOTHING_TO_CONVERT = {
    "test_byobnet",
    "test_coatnet",
    "test_convnext2",
    "test_convnext3",
    "test_efficientnet",
    "test_efficientnet_evos",
    "test_efficientnet_gn",
    "test_efficientnet_ln",
    "test_nfnet",
    "test_resnet",
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("bits", "autocast"), [(0, None), (3, torch.bfloat16)])
@pytest.mark.sampled(3)
def test_models(name: str, bits: int, autocast: torch.dtype | None) -> None:
    settings = SETTINGS[name]
    size = settings.get("img_size", 64)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **settings)
    with torch.no_grad():
        for parameter in model.parameters():  # freshly made, some branches are zero
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    x = torch.randn(2, 3, size, size)
    converted = revify.convert(model, x, bits=bits, transitions="checkpoint")
    assert_same_gradients(converted, [x], autocast=autocast, seed=4)
    plain = revify.revert(converted)
    assert_same(run(plain, [x]), run(model, [x]))


@pytest.mark.parametrize("name", sorted(NOTHING_TO_CONVERT))
def test_models_with_one_block_at_each_width(name: str) -> None:
    """They have no stage; what is worth it runs again all the same."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    converted = revify.convert(model, x)
    assert converted.revify_plan.stages == ()
    assert converted.revify_plan.checkpointed
    assert_same_gradients(converted, [x])


def test_every_test_model_of_timm_is_here() -> None:
    known = SETTINGS.keys() | NOTHING_TO_CONVERT
    missing = {name for name in timm.list_models("test_*") if name not in known}
    assert not missing, f"new in timm {timm.__version__}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 48, "drop_path_rate": 0.1, "proj_drop_rate": 0.1}, 64),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "attn_drop_rate": 0.1}, 64),
        ("convnext_tiny", {"drop_path_rate": 0.1}, 64),
        ("resnet50", {"drop_path_rate": 0.1, "drop_rate": 0.1}, 64),
        ("nf_resnet50", {"drop_path_rate": 0.1}, 64),
        ("efficientnetv2_rw_s", {"drop_path_rate": 0.1}, 64),
        ("mixer_s16_224", {"img_size": 64, "drop_path_rate": 0.1}, 64),
        ("eva02_tiny_patch14_224", {"img_size": 56}, 56),
        ("beit_base_patch16_224", {"img_size": 64, "depth": 4, "use_shared_rel_pos_bias": True}, 64),
        ("cait_xxs24_224", {"img_size": 64, "depth": 6}, 64),
        ("xcit_nano_12_p16_224", {"depth": 4}, 64),
        ("gcvit_xxtiny", {}, 224),
    ],
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_larger_models(name: str, settings: dict[str, object], size: int, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **settings)
    x = torch.randn(2, 3, size, size)
    for bits in (0, 1, 2, 4):
        converted = revify.convert(model, x, bits=bits)
        expected = run(converted, [x], plain=True, autocast=autocast)
        assert_same(run(converted, [x], autocast=autocast), expected)
