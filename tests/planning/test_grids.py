"""grid="auto": what flows through the blocks decides how fine the grid is, and in which type it is held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import zoo
from asserts import Unchanged, assert_same_gradients, converted, inputs_of, run
from torch import Tensor, nn

import revify
from revify.planning.grids import fitting_grid
from revify.plans import Plan
from revify.reading.flows import Flow
from revify.words import WIDE_GRID


class SmallAtFirst(zoo.Mlp):
    """LayerScale that starts at 1e-6."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class SmallUpdates(zoo.Net):
    def __init__(self) -> None:
        super().__init__(*(SmallAtFirst() for _ in range(4)))


class ZeroAtFirst(zoo.Net):
    """Blocks that start as the identity: no grid shows what they add, nor does the plain model."""

    def __init__(self) -> None:
        super().__init__(*(zoo.Mlp() for _ in range(4)))
        for block in self.blocks:
            nn.init.zeros_(block.down.weight)
            nn.init.zeros_(block.down.bias)


class LargeValues(zoo.Net):
    def __init__(self) -> None:
        super().__init__(*(zoo.Mlp() for _ in range(4)))
        nn.init.constant_(self.stem.bias, 3000.0)


class SmallValues(zoo.Net):
    """All that flows is below a few points of the default grid."""

    def __init__(self) -> None:
        super().__init__(*(SmallAtFirst() for _ in range(4)))
        with torch.no_grad():
            self.stem.weight.mul_(1e-4)
            self.stem.bias.mul_(1e-4)


def grid_of(model: nn.Module) -> int | None:
    return model.revify_plan.stages[0].grid


@pytest.mark.parametrize(
    ("net", "grid"),
    [
        (zoo.PreNormBlocks, 12),
        (ZeroAtFirst, 12),
        (LargeValues, 9),
        (SmallUpdates, WIDE_GRID),
        (SmallValues, WIDE_GRID),
    ],
)
@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "predictor": "zero", "unit": "branch"}])
def test_the_grid_follows_from_what_flows(net: Callable[[], nn.Module], grid: int, options: dict[str, object]) -> None:
    model = converted(net, **options)
    assert grid_of(model) == grid
    assert_same_gradients(model, inputs_of(model))
    assert Plan.from_json(model.revify_plan.to_json()) == model.revify_plan


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"bits": 0}, {"bits": 4}, {"predictor": "output", "bits": 1}, {"sign": "random", "bits": 1}, {"streams": "split"}],
)
def test_a_wide_grid_is_exact(options: dict[str, object], autocast: torch.dtype | None) -> None:
    model = converted(SmallUpdates, **options)
    assert grid_of(model) == WIDE_GRID
    found = assert_same_gradients(model, inputs_of(model), autocast=autocast)
    assert found["output"].dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("predictor", ["diagonal", "lowrank", "linear_z", "linear"])
def test_a_wide_grid_with_fitted_predictors_is_exact(predictor: str) -> None:
    torch.manual_seed(0)
    model = SmallUpdates()
    images = torch.randn(8, 5, 6)
    fitted = revify.convert(model, images, calibration=images, predictor=predictor, bits=1)
    assert grid_of(fitted) == WIDE_GRID
    assert_same_gradients(fitted, [images])


def test_every_block_shows_on_the_wide_grid_and_none_on_the_default() -> None:
    """The median block adds exactly nothing at 2^-12, and what the plain block adds at 2^-32."""
    for grid in (12, "auto"):
        model = converted(SmallUpdates, bits=0, grid=grid)
        plain = revify.revert(model)
        with torch.no_grad():
            z = (model.stem(inputs_of(model)[0]) * 4096).round() / 4096
            found, expected = model.blocks[0](z), plain.blocks[0](z)
        if grid == 12:
            assert torch.equal(found, z)
        else:
            assert torch.equal(found, expected)
            assert not torch.equal(found, z)


def test_precisions_that_round_small_changes_away_need_no_wide_grid() -> None:
    """A plain model in bfloat16 loses such changes itself."""
    torch.manual_seed(0)
    model = SmallUpdates().bfloat16()
    made = revify.plan(model, model.example()[0].bfloat16(), step="recurrence")
    assert made.stages[0].grid == 12


@pytest.mark.parametrize("example", ["zeros", "meta", "random"])
def test_an_example_that_only_shows_the_shape(example: str) -> None:
    torch.manual_seed(0)
    model = SmallUpdates()
    x = {"zeros": torch.zeros(2, 5, 6), "meta": torch.empty(2, 5, 6, device="meta"), "random": torch.randn(2, 5, 6)}
    with Unchanged(model):
        assert revify.plan(model, x[example], step="recurrence").stages[0].grid == WIDE_GRID


def test_a_model_without_data_keeps_the_default_and_the_plan_says_so() -> None:
    with torch.device("meta"):
        model = SmallUpdates()
    made = revify.plan(model, torch.empty(2, 5, 6, device="meta"), step="recurrence")
    assert made.grid_of(made.stages[0]).resolution == 12
    assert "the default, nothing was measured: the model holds no data" in str(made)


def test_the_plan_says_which_grid_and_what_it_holds() -> None:
    torch.manual_seed(0)
    model = SmallUpdates()
    fine, coarse = revify.plan(model, model.example(), step="recurrence"), revify.plan(model, model.example(), grid=12)
    assert "grid of stage 0: 2^-32, held in float64" in str(fine)
    assert "grid of stage 0: 2^-12" in str(coarse)
    assert fine.stages[0].stream_bytes == 2 * coarse.stages[0].stream_bytes
    assert revify.plan(model, model.example(), grid=32).stages[0].stream_bytes == fine.stages[0].stream_bytes


def test_buffers_and_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = zoo.TwoStages()
    x = model.example()[0]
    with Unchanged(model):
        revify.plan(model, x, step="recurrence")


@pytest.mark.parametrize("name", ["convnext_atto", "deit3_small_patch16_224", "cait_xxs24_224"])
def test_timm_models_with_layer_scale(name: str) -> None:
    torch.manual_seed(0)
    small = {"depth": 3, "img_size": 64} if "convnext" not in name else {"depths": (2, 2, 2, 2)}
    model = timm.create_model(name, num_classes=3, **small)
    made = revify.convert(model, torch.randn(2, 3, 64, 64), step="recurrence")
    assert grid_of(made) == WIDE_GRID
    assert_same_gradients(made, [torch.randn(2, 3, 64, 64)])


@pytest.mark.parametrize(
    ("flow", "grid"),
    [
        (Flow(peak=400.0, size=1.0, change=0.1), 12),
        (Flow(peak=1000.0, size=1.0, change=0.1), 11),
        (Flow(peak=1e6, size=1.0, change=1e4), 1),
        (Flow(peak=1e6, size=1.0, change=0.1), WIDE_GRID),
        (Flow(peak=float("nan"), size=1.0, change=0.1), 12),
    ],
)
def test_both_sides(flow: Flow, grid: int) -> None:
    assert fitting_grid([flow, flow], "float32") == grid


class Unsettled(zoo.Net):
    """Norms whose running statistics are still those of the beginning: in eval mode little is left of the stream."""

    SHAPE, POOLED = (4, 6, 4, 4), (2, 3)

    def __init__(self) -> None:
        super().__init__(*(zoo.Convolutions() for _ in range(3)))
        nn.init.constant_(self.stem.weight, 1e-5)
        nn.init.zeros_(self.stem.bias)
        self.settle = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.settle(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_a_model_in_eval_mode_is_looked_at_in_both_modes() -> None:
    torch.manual_seed(0)
    model = Unsettled()
    x = model.example()
    assert revify.plan(model, x, step="recurrence").stages[0].grid == 12
    evaluated = revify.convert(model.eval(), x, step="recurrence")
    assert grid_of(evaluated) == WIDE_GRID
    evaluated(*x).sum().backward()


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model = converted(SmallUpdates)
    x = inputs_of(model)[0]
    one = run(model, [x[:1]])["output"]
    assert torch.equal(run(model, [torch.cat([x[:1], 1000 * x[1:]])])["output"][:1], one)
