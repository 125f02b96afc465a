"""What does not repeat itself outside of the stages is found while planning, and left to ordinary autograd."""

from __future__ import annotations

import random

import pytest
import torch
from asserts import Count, Unchanged, assert_same_gradients
from torch import Tensor, nn

import revify


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() * (1 + random.random())


class HiddenNoise(nn.Module):
    """Only what its backward needs differs."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * (x * random.random()).exp().round()


class GrowsAndShrinks(nn.Module):
    """A state outside of the module's attributes: other operations at every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if self.count.up() % 2 else x.exp().log().tanh()


class Codes(nn.Module):
    """Changes a parameter when it runs, which the second run finds as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.code.data.mul_(0.9)
        return (x * self.code[:, None, None]).exp()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x))


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.Tanh(), inner, nn.Conv2d(6, 6, 1), nn.GELU(), nn.Conv2d(6, 6, 1)
        )
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


def checkpointed(plan: revify.Plan) -> set[str]:
    return {path for checkpoint in plan.checkpointed for path in checkpoint.paths}


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (Noise, "returns other values when it is run again"),
        (HiddenNoise, "has other values saved for its backward"),
        (GrowsAndShrinks, "saves other tensors for its backward"),
    ],
)
def test_what_does_not_repeat_itself_is_left_out(inner: type[nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model, x = Net(inner()), torch.randn(2, 3, 8, 8)
    with Unchanged(model):
        plan = revify.plan(model, x)
    assert "stem" not in checkpointed(plan)
    assert "stem.2" not in checkpointed(plan)
    assert any(path.startswith("stem.") for path in checkpointed(plan))
    (found,) = [refusal for refusal in plan.refusals if refusal.path == "stem.2"]
    assert reason in found.reason
    assert "is not checkpointed" in found.remedy
    if inner is Noise:
        converted = revify.convert(model, x)
        random.seed(0)
        loss = converted(x).square().sum()
        loss.backward()


def test_what_changes_its_parameters_and_repeats_is_checkpointed() -> None:
    torch.manual_seed(0)
    model, x = Net(Codes()), torch.randn(2, 3, 8, 8)
    with Unchanged(model):
        plan = revify.plan(model, x)
    assert "stem" in checkpointed(plan)
    converted = revify.convert(model, x)
    code = converted.stem[2].code
    with torch.no_grad():
        before = code.clone()
    converted(x).sum().backward()
    assert torch.equal(code, before * 0.9)


def test_dropout_repeats() -> None:
    torch.manual_seed(0)
    converted = revify.convert(Net(nn.Dropout(0.3)), x := torch.randn(2, 3, 8, 8))
    assert "stem" in checkpointed(converted.revify_plan)
    assert_same_gradients(converted, [x])
