"""unit="branch": each residual addition is a step, which calls the block's own child modules."""

from __future__ import annotations

import random

import pytest
import timm
import torch
from asserts import assert_same_gradients, converted, inputs_of, run
from branch_nets import WIDTH, InPlace, Masked, Normed, Reshaped, Scaled, Three, Two, net
from torch import Tensor, nn
from torch.nn import functional

import revify
from revify.measuring.memory import count_memory
from revify.planning.branching import prove
from revify.plans import Plan
from revify.reading.segments import find_branches, find_segments


def cut(block: type[nn.Module], **options: object) -> nn.Module:
    return converted(lambda: net(block), unit="branch", **options)


@pytest.mark.parametrize("block", [Two, Scaled, InPlace, Reshaped, Masked, Three, Normed])
@pytest.mark.parametrize(
    ("bits", "predictor", "autocast"),
    [(0, "identity", None), (3, "midpoint", None), (2, "zero", None), (1, "output", torch.bfloat16)],
)
def test_gradients_are_those_of_autograd_bit_for_bit(
    block: type[nn.Module], bits: int, predictor: str, autocast: torch.dtype | None
) -> None:
    model = cut(block, bits=bits, predictor=predictor)
    stage = model.revify_plan.stages[0]
    assert len(stage.steps) == (9 if block is Three else 6)
    assert all(sum(b.branch_bytes) == b.saved_bytes and min(b.branch_bytes) > 0 for b in stage.blocks)
    found = assert_same_gradients(model, inputs_of(model), autocast=autocast)
    if block is Normed:
        assert found["buffer blocks.1.norm.num_batches_tracked"] == 1
    if block is Masked:
        assert found["grad mask"].abs().min() > 0


def test_other_precisions() -> None:
    model = cut(Two, bits=2).to(torch.bfloat16)
    assert_same_gradients(model, [x.bfloat16() for x in inputs_of(model)])


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_vit3", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"]
)
@pytest.mark.sampled(2)
def test_timm_models(name: str) -> None:
    torch.manual_seed(0)
    small = {"depths": (2, 2), "embed_dim": 12, "num_heads": (2, 4), "img_size": 56} if "swin" in name else {}
    model = timm.create_model(name, drop_path_rate=0.1, num_classes=3, **small)
    size = 56 if "swin" in name else 64 if "xcit" in name else 160
    images = torch.randn(3, 3, size, size)
    model = revify.convert(model, images, unit="branch", bits=1)
    stage = model.revify_plan.stages[0]
    assert len(stage.steps) >= 2 * len(stage.blocks)
    assert_same_gradients(model, [images])


def test_with_gain_one_it_is_reversible_vision_transformer() -> None:
    """y1 = x1 + F(x2), y2 = x2 + G(y1), from x1 = x2 = x."""
    model = cut(Two, bits=0, grid=20).eval()
    x = inputs_of(model)[0]
    with torch.no_grad():
        x1 = x2 = model.stem(x)
        for block in model.blocks:
            x1 = x1 + block.one(x2)
            x2 = x2 + block.two(x1)
        torch.testing.assert_close(model(x), model.head(x2.mean(1)), rtol=0, atol=1e-5)


def test_the_first_addition_alone_is_the_plain_blocks() -> None:
    plain = net(Two)
    reverted = revify.revert(revify.convert(plain, plain.example(), unit="branch"))
    x = inputs_of(plain)
    assert torch.equal(run(reverted, x)["output"], run(plain, x)["output"])


def test_modes_hooks_and_names_stay_those_of_the_block() -> None:
    model, seen = cut(Two, bits=0), []
    assert model.state_dict().keys() == net(Two).state_dict().keys()
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append("block"))
    model.blocks[1].two[1].register_forward_hook(lambda module, args, output: seen.append("child"))
    x = inputs_of(model)[0]
    with torch.no_grad():
        first, second = model(x), model(x)
    assert seen == ["block", "child"] * 2 or seen == ["child", "block"] * 2
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_parameters_that_are_replaced_later_are_used() -> None:
    model = cut(Scaled, bits=0).eval()
    before = model(*inputs_of(model))
    model.blocks[0].scale = nn.Parameter(torch.zeros(WIDTH))
    assert not torch.equal(model(*inputs_of(model)), before)


def test_a_plan_with_branches_goes_through_json() -> None:
    plain = net(Masked)
    plan = revify.plan(plain, plain.example(), unit="branch", bits=1)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert "3 Masked, 6 branches" in str(plan)
    model = revify.convert(plain, plan=again)
    assert_same_gradients(model, inputs_of(plain))


def test_only_one_branch_lives_at_a_time() -> None:
    peaks = {}
    for unit in ("block", "branch"):
        torch.manual_seed(0)
        images = torch.randn(8, 3, 112, 112)
        model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=96, num_heads=3, img_size=112)
        model = revify.convert(model, images, unit=unit, bits=0)
        model(images).sum().backward()
        peaks[unit] = count_memory(lambda: model(images).sum(), torch.device("cpu")).peak  # noqa: B023
    assert peaks["branch"] <= 0.78 * peaks["block"]


# What is not cut


class AsksForItsMode(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.dropout(self.one(x), 0.1, self.training)
        return x + self.two(x)


class Parallel(Two):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x) + self.two(x)


class LooksBack(Two):
    """The second branch sees the block's input."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.one(x)
        return y + self.two(x)


class SizeOfABranch(Two):
    """The second branch needs the size of something in the first."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.one(x)
        y = x + inner
        return y + self.two(y) * inner.shape[1]


class SideEffect(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.one(x)
        branch = self.two(y)
        branch.mul_(0.5)
        return y + branch


class Open(Two):
    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(x)


@pytest.mark.parametrize("block", [AsksForItsMode, Parallel, LooksBack, SizeOfABranch, SideEffect, Open])
def test_what_cannot_be_cut_stays_one_step(block: type[nn.Module]) -> None:
    assert find_segments(block(), 0, (0,)) == ()
    model = cut(block, bits=1)
    assert len(model.revify_plan.stages[0].steps) == 3
    assert_same_gradients(model, inputs_of(model))


def test_an_argument_that_was_a_default() -> None:
    model = cut(Scaled)
    assert model.blocks[0](torch.randn(2, 5, WIDTH), 0.0).shape == (2, 5, WIDTH)
    with pytest.raises(revify.StreamError, match=r"argument shift is float, and was 0\.0"):
        model.blocks[0](torch.randn(2, 5, WIDTH), shift=1.0)


def test_what_is_refused() -> None:
    plain = net(Two)
    with pytest.raises(revify.RevifyError, match='unit=\'half\' is not known: choose "block" or "branch"'):
        revify.plan(plain, plain.example(), unit="half")
    with pytest.raises(revify.RevifyError, match="fitted to whole blocks"):
        revify.convert(plain, plain.example(), unit="branch", calibration=plain.example()[0])
    with pytest.raises(revify.RefusalError, match="fitted to whole blocks"):
        revify.calibrate(cut(Two), plain.example()[0])
    plan = revify.plan(plain, plain.example(), unit="branch")
    with pytest.raises(revify.RefusalError, match=r"cuts blocks\.0 into 2 branches, but its forward has 0"):
        revify.convert(net(type("Two", (Parallel,), {})), plan=plan)


# What a graph would leave out, or fix for ever


class Transposed(Two):
    """The second branch works on the transpose of the block's input, which is no size of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.one(x)
        return y + self.two(y) * x.mT.mT


class Data(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.one(x)
        return y + self.two(y) + 0.5 * x.data


class SizesAndPlaces(Two):
    """What tells of the block's input only its size, type and place."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.one(x)
        ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
        return y + self.two(y) * ones / x.ndim


class DropsByTorch(Two):
    """Stochastic depth in the block's own code, for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or torch.rand(1).item() > 0.5:
            x = x + self.one(x)
        return x + self.two(x)


class DropsByPython(Two):
    def forward(self, x: Tensor) -> Tensor:
        scale = float(random.random() > 0.5) if self.training else 1.0
        x = x + self.one(x) * scale
        return x + self.two(x)


class DropsByOwnGenerator(Two):
    def __init__(self) -> None:
        super().__init__()
        self.coins = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x) * float(self.coins.random() > 0.5)
        return x + self.two(x)


class CountsItsCalls(Two):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + self.one(x)
        return x + self.two(x)


class KeepsAHistory(Two):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[object] = []

    def forward(self, x: Tensor) -> Tensor:
        self._note(x)
        x = x + self.one(x)
        return x + self.two(x)

    def _note(self, x: Tensor) -> None:
        self.shapes.append(x.shape)


class AsksForGradients(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x) * (1.0 if torch.is_grad_enabled() else 0.5)
        return x + self.two(x)


@pytest.mark.parametrize(
    "block",
    [
        Transposed,
        Data,
        DropsByTorch,
        DropsByPython,
        DropsByOwnGenerator,
        CountsItsCalls,
        KeepsAHistory,
        AsksForGradients,
    ],
)
def test_what_a_graph_would_not_do_as_the_block_does_stays_one_step(block: type[nn.Module]) -> None:
    assert find_segments(block(), 0, (0,)) == ()
    assert find_branches(block(), 0, (0,)) == ()


def test_side_effects_happen_as_often_as_in_the_plain_model() -> None:
    model = cut(CountsItsCalls, bits=1).eval()
    with torch.no_grad():
        for _ in range(3):
            model(*inputs_of(model))
    assert [block.calls for block in model.blocks] == [3, 3, 3]


def test_sizes_types_and_places_are_no_values() -> None:
    model = cut(SizesAndPlaces, bits=1)
    made_of_sizes = not torch.__version__.startswith("2.8.")  # whose torch.fx makes no tensor of a size that it follows
    assert len(model.revify_plan.stages[0].steps) == (6 if made_of_sizes else 3)
    assert_same_gradients(model, inputs_of(model))


class Flagged(Two):
    """Flags of the block's own and of a child, which decide what its code does."""

    half = False

    def __init__(self) -> None:
        super().__init__()
        self.times = 2
        self.one.twice = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if self.one.twice:
            y = y + self.one(x)
        x = x + (0.5 * y if self.half else y) * self.times
        return x + self.two(x)


@pytest.mark.parametrize("flag", ["half", "times", "one.twice"])
@pytest.mark.parametrize("options", [{"unit": "branch", "bits": 1}, {"streams": "split"}])
def test_a_flag_that_is_changed_after_conversion_is_refused(flag: str, options: dict[str, object]) -> None:
    model = converted(lambda: net(Flagged), **options)
    assert_same_gradients(model, inputs_of(model))
    path, _, name = flag.rpartition(".")
    setattr(model.blocks[1].get_submodule(path), name, 3)
    with pytest.raises(revify.StreamError, match=rf"Flagged\.{flag} is 3, and was .* cut into its branches"):
        model(*inputs_of(model))


def test_segments_that_give_other_values_are_not_used() -> None:
    """However a cut came about: it is tried with data, and compared with the block."""
    model = net(Two)
    paths = [f"blocks.{number}" for number in range(3)]
    right = {path: find_segments(model.get_submodule(path), 0, (0,)) for path in paths}
    assert prove(model, model.example(), right) == set(paths)
    wrong = {path: (segments[0], segments[0]) for path, segments in right.items()}
    assert prove(model, model.example(), wrong) == set()


def test_an_argument_that_was_a_tensor_and_is_missing() -> None:
    model = cut(Masked)
    with pytest.raises(revify.StreamError, match=r"its argument mask is missing, and was a tensor"):
        model.blocks[0](torch.randn(2, 5, WIDTH))
