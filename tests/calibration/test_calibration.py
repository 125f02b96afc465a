"""calibration: fitted forecasts keep the function, stay exact, travel in checkpoints and go with revert."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import zoo
from asserts import assert_same_gradients
from torch import Tensor, nn

import revify
from revify.calibration.calibrating import fit_plan
from revify.calibration.settling import Fitting, deviation
from revify.plans import Plan
from revify.rewriting.applying import apply_plan
from revify.words import CALIBRATED


class Smooth(nn.Module):
    """A net whose blocks change the stream little by little, as trained ones do."""

    def __init__(self, channels: int = 8, depth: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Smooth.Block(channels) for _ in range(depth)))
        self.head = nn.Linear(channels, 4)

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(channels)
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.5 * torch.tanh(self.conv(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = Smooth()
    net(images)  # settle the BatchNorm statistics
    return net.eval()


def change(model: nn.Module, converted: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return deviation([converted.eval()(x)], [model.eval()(x)])


@pytest.mark.parametrize("bits", [0, 2])
def test_every_predictor_stays_nearer_to_the_original_than_rewiring(
    model: nn.Module, images: Tensor, bits: int
) -> None:
    fresh = torch.randn(16, 3, 8, 8)
    rewired = revify.convert(model, images, bits=bits, step="recurrence", sign="positive")
    before = change(model, rewired, fresh)
    for predictor in CALIBRATED:
        calibrated = revify.calibrate(rewired, images, predictor=predictor, rank=2 if predictor == "lowrank" else None)
        assert change(model, calibrated, fresh) < 0.8 * before, predictor


def test_richer_predictors_stay_nearer(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, images, bits=0)
    changes = [
        change(model, revify.calibrate(converted, images, predictor=predictor), images)
        for predictor in ("diagonal", "linear_z", "linear")
    ]
    assert changes[0] > changes[1] > changes[2]


@pytest.mark.parametrize("predictor", CALIBRATED)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_ordinary_autograd(
    model: nn.Module, images: Tensor, predictor: str, trainable: bool, autocast: bool
) -> None:
    converted = revify.calibrate(
        revify.convert(model, images, bits=1), images, predictor=predictor, trainable=trainable
    ).train()
    gradients = []
    for context in (nullcontext(), revify.plain_backward()):
        converted.zero_grad()
        x = images.clone().requires_grad_()
        with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = converted(x).float().square().sum()
        loss.backward()
        gradients.append([x.grad, *(p.grad for p in converted.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    names = [name for name, _ in converted.named_parameters() if ".revify_" in name]
    assert bool(names) == trainable


def test_auto_chooses_what_the_blocks_can_afford() -> None:
    vit = revify.convert(timm.create_model("test_vit"), bits=2)
    x = torch.randn(4, 3, 160, 160)
    stage = revify.calibrate(vit, x).revify_plan.stages[0]
    assert stage.predictor == "linear_z"  # C of some 13·C multiply-adds an element; T(z) too would be over a tenth
    conv = revify.convert(timm.create_model("test_convnext"), bits=2)
    found = revify.calibrate(conv, torch.randn(4, 3, 160, 160)).revify_plan.stages[0]
    assert found.predictor == "lowrank"
    assert 1 <= found.rank < found.shape[1]


def test_auto_bits_are_the_fewest_within_the_tolerance(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, images, calibration=images, predictor="diagonal", bits="auto")
    loose = revify.calibrate(converted, images, predictor="diagonal", bits="auto", tolerance=0.2)
    tight = revify.calibrate(converted, images, predictor="diagonal", bits="auto", tolerance=0.01)
    assert sum(loose.revify_plan.stages[0].step_bits) < sum(tight.revify_plan.stages[0].step_bits)
    for calibrated, tolerance in ((loose, 0.2), (tight, 0.01)):
        stage = calibrated.revify_plan.stages[0]
        assert stage.deviation == pytest.approx(change(model, calibrated, images), rel=1e-3)
        assert stage.deviation <= tolerance
        fewest = min(stage.step_bits[1:])
        if fewest:  # no fewer bits in all blocks are enough
            fewer = revify.calibrate(converted, images, predictor="diagonal", bits=fewest - 1)
            assert change(model, fewer, images) > tolerance


def test_auto_bits_go_to_the_blocks_that_forecast_badly() -> None:
    """A block that changes the stream by something that no predictor of one value can tell, among quiet ones."""

    class Quiet(zoo.Mlp):
        def __init__(self) -> None:
            super().__init__(8)
            with torch.no_grad():
                self.down.weight *= 0.01

    torch.manual_seed(0)
    blocks: list[nn.Module] = [Quiet() for _ in range(8)]
    with torch.no_grad():
        blocks[3].down.weight *= 300
    model, x = nn.Sequential(*blocks), torch.randn(64, 5, 8)
    start = revify.calibrate(revify.convert(model, x, grid=15), x, predictor="diagonal", bits=0)
    tolerance = start.revify_plan.stages[0].deviation / 3
    converted = revify.calibrate(start, x, predictor="diagonal", bits="auto", tolerance=tolerance)
    (stage,) = converted.revify_plan.stages
    most = max(stage.step_bits[1:])
    assert stage.step_bits[4] == most > min(stage.step_bits[1:]) == 0  # the step after it has to forecast its input
    assert "(0–" in str(converted.revify_plan)
    assert_same_gradients(converted, (x,))
    again = revify.Plan.from_json(converted.revify_plan.to_json())
    assert again == converted.revify_plan
    uniform = revify.calibrate(converted, x, predictor="diagonal", bits=2)
    assert uniform.revify_plan.stages[0].step_bits == (2,) * 8
    kept = revify.calibrate(converted, x, predictor="diagonal")
    assert kept.revify_plan.stages[0].step_bits == stage.step_bits


def test_batches_may_come_one_by_one_with_labels(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, images, bits=1)
    whole = revify.calibrate(converted, images, predictor="diagonal")
    parts = revify.calibrate(
        converted, [(images[:8], torch.zeros(8)), (images[8:], torch.zeros(4))], predictor="diagonal"
    )
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("predictor", ["lowrank", "linear_z", "linear"])
def test_a_higher_ridge_mixes_less(model: nn.Module, images: Tensor, predictor: str) -> None:
    converted = revify.convert(model, images, bits=1)
    sizes = []
    for ridge in (0, 1, 1e6):
        held = dict(revify.calibrate(converted, images, predictor=predictor, ridge=ridge).blocks[2].named_buffers())
        mixing = held["revify_up"] @ held["revify_down"] if predictor == "lowrank" else held["revify_weight"]
        sizes.append(mixing.norm())
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 1e-4


def test_one_batch_is_the_example_too(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, calibration=images, predictor="diagonal", bits=1)  # the net says no input size
    assert converted.revify_plan.stages[0].shape == (2, 8, 8, 8)


def test_fewer_positions_than_channels_is_no_harm() -> None:
    torch.manual_seed(0)
    net = Smooth(channels=24).eval()
    x = torch.randn(2, 3, 2, 2)
    converted = revify.convert(net, x, bits=1)
    fresh = torch.randn(64, 3, 2, 2)
    linear = revify.calibrate(converted, x, predictor="linear")
    assert change(net, linear, fresh) < 1.1 * change(net, converted, fresh)


def test_model_and_modes_stay_as_they_were(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, images, bits=1)
    converted.train()
    converted.blocks[2].eval()
    state = copy.deepcopy(converted.state_dict())
    rng = torch.get_rng_state()
    calibrated = revify.calibrate(converted, images, predictor="diagonal")
    assert list(converted.state_dict()) == list(state)
    assert all(torch.equal(converted.state_dict()[name], tensor) for name, tensor in state.items())
    assert [m.training for m in calibrated.modules()] == [m.training for m in converted.modules()]
    assert calibrated.stem.weight is model.stem.weight
    assert torch.equal(torch.get_rng_state(), rng)


def test_plain_checkpoints_load_strictly_and_leave_the_forecast(model: nn.Module, images: Tensor) -> None:
    calibrated = revify.calibrate(revify.convert(model, images, bits=1), images, predictor="linear")
    forecast = calibrated.blocks[1].revify_weight.clone()
    calibrated.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(calibrated.blocks[1].revify_weight, forecast)


def test_revert_drops_the_forecast(model: nn.Module, images: Tensor) -> None:
    plain = revify.revert(revify.calibrate(revify.convert(model, images), images, predictor="linear"))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert torch.equal(plain(images), model(images))
    with pytest.raises(RuntimeError, match="Missing key"):  # nothing of the tolerant loading is left
        plain.load_state_dict({})


@pytest.mark.parametrize("predictor", CALIBRATED)
def test_save_and_load_keep_the_forecast(model: nn.Module, images: Tensor, predictor: str, tmp_path: Path) -> None:
    calibrated = revify.calibrate(revify.convert(model, images, bits=1), images, predictor=predictor).eval()
    revify.save(calibrated, tmp_path / "model.safetensors")
    loaded = revify.load(tmp_path / "model.safetensors", Smooth()).eval()
    assert torch.equal(loaded(images), calibrated(images))
    assert loaded.revify_plan == calibrated.revify_plan
    for twin in (copy.deepcopy(calibrated), pickle.loads(pickle.dumps(calibrated))):
        assert torch.equal(twin(images), calibrated(images))


def test_refusals(model: nn.Module, images: Tensor) -> None:
    converted = revify.convert(model, images)
    with pytest.raises(revify.RefusalError, match="is not a converted model: convert it, then calibrate it"):
        revify.calibrate(model, images)
    with pytest.raises(revify.RevifyError, match="cannot be calibrated: choose auto, diagonal"):
        revify.calibrate(converted, images, predictor="midpoint")
    with pytest.raises(revify.RevifyError, match="predictor='quadratic' is not known: choose one of identity"):
        revify.calibrate(converted, images, predictor="quadratic")
    with pytest.raises(
        revify.RevifyError, match="bits=9 is no number of residue bits: give a whole number from 0 to 8"
    ):
        revify.calibrate(converted, images, bits=9)
    with pytest.raises(revify.RevifyError, match="there is no batch in them"):
        revify.calibrate(converted, [])
    with pytest.raises(revify.RevifyError, match="tolerance=0: give a relative error above 0"):
        revify.calibrate(converted, images, tolerance=0)
    with pytest.raises(revify.RevifyError, match="ridge=-1: give a number from 0 upward"):
        revify.calibrate(converted, images, ridge=-1)
    with pytest.raises(revify.RevifyError, match=r"this is fitted on images\. Pass some"):
        revify.convert(model, images, bits="auto")


def test_the_module_tree_is_copied_once_for_each_stage_and_not_for_each_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", depths=(2, 2, 2, 2), dims=(8, 8, 16, 16), ls_init_value=0.5)
    images, said, copies = torch.randn(4, 3, 64, 64), [], []
    plan = revify.plan(model, images)
    for place in ("revify.calibration.calibrating", "revify.calibration.settling"):
        monkeypatch.setattr(f"{place}.apply_plan", lambda *a, **k: (copies.append(1), apply_plan(*a, **k))[1])
    method = revify.Method(predictor="diagonal", bits="auto")
    fit_plan(model, plan, images, method, Fitting(tolerance=1e-4, progress=said.append))
    assert len(said) > len(plan.stages) > 1  # several trials
    assert len(copies) == len(plan.stages) + 1  # and one to see what the output depends on


def test_a_tolerance_that_is_not_reached_is_told(model: nn.Module, images: Tensor) -> None:
    said: list[str] = []
    method = revify.Method(predictor="diagonal", bits="auto")
    fit_plan(model, revify.plan(model, images, grid=4), images, method, Fitting(tolerance=1e-9, progress=said.append))
    assert "is kept, though" in said[-1]


def test_fitting_a_plan_leaves_the_model_alone(model: nn.Module, images: Tensor) -> None:
    modes = [part.training for part in model.train().modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fit_plan(model, revify.plan(model, images), images, revify.Method(predictor="linear", bits=1), Fitting())
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_coded_steps_become_a_recurrence_that_is_fitted(model: nn.Module, images: Tensor) -> None:
    coded = revify.convert(model, images)
    assert coded.revify_plan.stages[0].step == "coded"
    fitted = revify.calibrate(coded, images, predictor="diagonal")
    (stage,) = fitted.revify_plan.stages
    assert (stage.step, stage.predictor, stage.bits) == ("recurrence", "diagonal", 4)
    assert change(model, fitted, images) == pytest.approx(stage.deviation, rel=1e-3)  # the plan's figure is the model's
    assert Plan.from_json(fitted.revify_plan.to_json()) == fitted.revify_plan
    assert_same_gradients(fitted.train(), (images,))
