"""One small model of each kind of difficulty in timm converts, and its gradients are those of the plain backward.

benchmarks/coverage.py does the same for every structure in timm.
"""

from __future__ import annotations

import pytest
import timm
import torch
from asserts import assert_same, run

import revify

# name → stages, arguments, and what is difficult about it
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "efficientvim_m1": ("2-2-2", {}),  # blocks return a stream and a hidden state
    "mvitv2_tiny": ("4", {"img_size": 64}),  # blocks return a stream and its size
    "tnt_s_legacy_patch16_224": ("12", {"img_size": 64, "drop_path_rate": 0.2}),  # two streams, the second is ours
    "convit_tiny": ("10-2", {"img_size": 64}),  # makes a table at its first call
    "poolformerv2_s12": ("2-2-6-2", {}),  # scaled shortcuts
    "xcit_nano_12_p16_224": ("12-2", {"img_size": 64}),  # sizes beside the stream; three additions
    "gcvit_xxtiny": ("2-2-6-2", {"img_size": 64}),  # a query that all blocks of a stage share, with a gradient
    "davit_tiny": ("2-2-6-2", {}),  # windows between the additions
    "repghostnet_050": ("3-4", {}),  # in-place activations
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sampled(3)
def test_gradients_and_the_way_back(name: str) -> None:
    expected, arguments = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments)
    images = torch.randn(2, 3, 64, 64)
    converted = revify.convert(model, images)
    assert "-".join(str(len(stage.blocks)) for stage in converted.revify_plan.stages) == expected
    assert list(converted.state_dict()) == list(model.state_dict())
    assert_same(run(converted, [images]), run(converted, [images], plain=True))
    assert_same(run(revify.revert(converted), [images]), run(model, [images]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vgg11", "no module adds its input to its output"),
        ("densenet121", "its output is concatenated with its input"),
        ("repvgg_a0", "changes the shape (48×112×112 to 48×56×56): a transition"),
    ],
)
def test_refusals_say_what_was_found(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = revify.plan(model)
    assert not plan.stages
    assert any(reason in refusal.reason and refusal.remedy for refusal in plan.refusals)
