"""What `measure` counts is exact on the CPU, and it leaves the model as it found it."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import Tensor, nn

import revify
from revify.measuring.measuring import mean_square
from revify.measuring.memory import count_memory

CPU = torch.device("cpu")


def vit(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", **{"img_size": 128, "num_classes": 10, **changes})


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.ResNet(
        timm.models.resnet.BasicBlock, (3, 1, 1, 1), num_classes=10, channels=(8, 8, 8, 8), drop_path_rate=0.1
    )


def images() -> Tensor:
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def test_allocated_bytes_are_exact() -> None:
    x = torch.randn(1000, 1000, requires_grad=True)
    x.grad = torch.zeros_like(x)
    size = x.numel() * x.element_size()

    def forward() -> Tensor:
        y = x
        for _ in range(5):
            y = y.sigmoid()  # each keeps its output for the backward
        return y.sum()

    memory = count_memory(forward, CPU)
    assert size * 5 <= memory.held <= size * 5 + 64  # and the sum
    assert size * 6 <= memory.peak <= size * 7 + 128
    assert count_memory(forward, CPU) == memory


def test_memory_that_is_freed_before_the_backward_is_not_held() -> None:
    x = torch.randn(1000, 1000, requires_grad=True)
    x.grad = torch.zeros_like(x)
    memory = count_memory(lambda: (x + 1).sum(), CPU)
    assert memory.held <= 64
    assert memory.peak >= x.numel() * x.element_size()


def test_what_was_allocated_before_does_not_count() -> None:
    kept = [torch.ones(1000, 1000)]
    x = torch.ones(10, requires_grad=True)

    def forward() -> Tensor:
        kept.clear()  # a release below the starting point is no negative cost later on
        return x.sum()

    assert 0 <= count_memory(forward, CPU).peak < 1000


def test_the_three_forms_side_by_side() -> None:
    report = revify.measure(vit(), images(), plan=revify.plan(vit(), images(), bits=0), repeats=1)
    plain, checkpointed, converted = report.plain, report.checkpointed, report.converted
    assert plain.peak_bytes > checkpointed.peak_bytes > 0
    assert plain.peak_bytes > converted.peak_bytes > 0
    assert plain.held_bytes > checkpointed.held_bytes > converted.held_bytes > 0
    assert checkpointed.time_ratio == 1
    for row in (plain, checkpointed, converted):
        assert row.held_bytes <= row.peak_bytes
        assert row.step_seconds > 0
        assert row.time_ratio > 0


def test_bytes_repeat_exactly_from_plain_or_converted() -> None:
    plan = revify.plan(vit(), images(), bits=2)
    reports = [revify.measure(vit(), images(), plan=plan, repeats=1) for _ in range(2)]
    reports.append(revify.measure(revify.convert(vit(), plan=plan), images(), repeats=1))
    counted = [
        [(row.peak_bytes, row.held_bytes) for row in (each.plain, each.checkpointed, each.converted)]
        for each in reports
    ]
    assert counted[0] == counted[1] == counted[2]
    assert "2 bits" in reports[2].converted.how


def test_residue_bits_are_held() -> None:
    """Each of b bits of each stream element that steps is held: b/8 bytes, whole bytes per step."""
    model = vit()
    held = {
        bits: revify.measure(
            model, images(), plan=revify.plan(model, images(), bits=bits, step="recurrence"), repeats=1
        ).converted
        for bits in (0, 1, 4)
    }
    blocks = sum(len(stage.blocks) for stage in revify.plan(model, images()).stages)
    elements = model.blocks[0](torch.zeros(2, 65, 64)).numel()
    for bits in (1, 4):
        extra = held[bits].held_bytes - held[0].held_bytes
        assert extra == pytest.approx((blocks - 1) * elements * bits / 8, rel=0.02)


def test_a_model_without_timms_checkpointing_is_checkpointed_by_its_plan() -> None:
    class Unsupported(timm.models.VisionTransformer):
        def set_grad_checkpointing(self, enable: bool = True) -> None:
            assert not enable, "gradient checkpointing not supported"

    settings = {
        "img_size": 128,
        "patch_size": 16,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 10,
    }
    theirs, own = (kind(**settings) for kind in (timm.models.VisionTransformer, Unsupported))
    reports = [revify.measure(model, images(), repeats=1) for model in (theirs, own)]
    assert "set_grad_checkpointing" in reports[0].checkpointed.how
    assert "torch.utils.checkpoint" in reports[1].checkpointed.how
    assert reports[1].checkpointed.held_bytes == reports[0].checkpointed.held_bytes
    assert "forward" not in vars(own.blocks[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(training: bool, fails: bool) -> None:
    model = resnet().train(training)
    model.layer1.eval()
    mean_square(model(images())).backward()
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    gradients = [(each.grad, each.grad.clone()) for each in model.parameters()]
    keys = [set(vars(part)) for part in model.modules()]
    drawn = torch.get_rng_state()

    def loss(output: Tensor) -> Tensor:
        if fails:
            raise ZeroDivisionError
        return output.sum()

    if fails:
        with pytest.raises(ZeroDivisionError):
            revify.measure(model, images(), loss=loss, repeats=1)
    else:
        revify.measure(model, images(), loss=loss, repeats=1)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [part.training for part in model.modules()] == modes
    assert [set(vars(part)) for part in model.modules()] == keys
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, (gradient, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_a_form_that_does_not_fit_leaves_a_gap() -> None:
    calls = []

    def loss(output: Tensor) -> Tensor:
        calls.append(output)
        if len(calls) == 1:  # the warm-up of the plain form
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return mean_square(output)

    report = revify.measure(vit(), images(), loss=loss, repeats=1)
    assert report.plain.peak_bytes is None
    assert report.plain.step_seconds is None
    assert report.converted.time_ratio is not None
    assert ["plain", "out", "of", "memory"] in [line.split() for line in str(report).splitlines()]


def test_autocast_is_used_and_reported() -> None:
    seen: list[torch.dtype] = []

    def loss(output: Tensor) -> Tensor:
        seen.append(output.dtype)
        return mean_square(output)

    report = revify.measure(vit(), images(), autocast=torch.bfloat16, loss=loss, repeats=1)
    assert set(seen) == {torch.bfloat16}
    assert report.dtype == "autocast bfloat16"
    assert report.plain.held_bytes < revify.measure(vit(), images(), repeats=1).plain.held_bytes


def test_the_report_prints_as_a_table_and_as_json() -> None:
    report = revify.measure(vit(), images(), repeats=2)
    text = str(report)
    for part in (
        "VisionTransformer",
        "2×3×128×128",
        torch.__version__,
        timm.__version__,
        revify.__version__,
        "cpu",
    ):
        assert part in text
    assert f"{report.converted.peak_bytes / 1e6:.2f}" in text
    assert f"{report.converted.peak_bytes / report.checkpointed.peak_bytes:.3f}" in text
    data = json.loads(report.to_json())
    assert data["converted"]["peak_bytes"] == report.converted.peak_bytes
    assert data["threads"] == torch.get_num_threads()
    assert data["batch"] == [[2, 3, 128, 128]]


def frozen() -> nn.Module:
    return vit().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "batch", "options", "text"),
    [
        (vit, "images", {}, "not str"),
        (vit, (), {}, "not tuple"),
        (vit, torch.zeros(0, 3, 128, 128), {}, "is empty"),
        (vit, images(), {"repeats": 0}, "repeats is 0"),
        (vit, images().to("meta"), {}, "found cpu, meta"),
        (vit, images(), {"loss": lambda output: output}, r"it is shape \(2, 10\)"),
        (vit, images(), {"loss": lambda output: 3.0}, "it is a float"),
        (frozen, images(), {}, "no parameter requires a gradient"),
    ],
)
def test_what_cannot_be_measured(model, batch, options, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(revify.RevifyError, match=text):
        revify.measure(model(), batch, **options)


def test_a_plan_for_a_converted_model_is_refused() -> None:
    model = revify.convert(vit(), example=images())
    with pytest.raises(revify.RevifyError, match="converted already"):
        revify.measure(model, images(), plan=model.revify_plan)


@pytest.mark.gpu
def test_cuda_counts_by_its_own_counters() -> None:
    model, batch = vit().cuda(), images().cuda()
    report = revify.measure(model, batch, repeats=1)
    assert report.device.startswith("cuda")
    assert report.plain.held_bytes > report.checkpointed.held_bytes > report.converted.held_bytes > 0
    assert report.plain.peak_bytes > report.converted.peak_bytes > report.converted.held_bytes
