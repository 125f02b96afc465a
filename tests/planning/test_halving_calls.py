"""streams="split": blocks that are called with more than their stream, and optimizers that step within the backward."""

from __future__ import annotations

import contextlib

import pytest
import torch
import zoo
from asserts import assert_same_gradients, converted, inputs_of
from torch import Tensor, nn

import revify
from revify.stage_plans import CUT, WHOLE


class ScaledByTheCaller(zoo.Mlp):
    """Its branch is scaled by a number that the caller gives."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(torch.relu(self.up(self.norm(x))))


class SwitchedByTheCaller(zoo.Mlp):
    """What its branch does hangs on a word that the caller gives."""

    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        y = self.up(self.norm(x))
        return x + self.down(y.relu() if act == "relu" else y.tanh())


class TwoMlps(zoo.Mlp):
    """Two branches, both of which can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.second(x)


class Calling(zoo.Net):
    """A net that calls its blocks with something of its own."""

    def __init__(self, block: type[nn.Module], how: str, *values: object) -> None:
        super().__init__(*(block() for _ in range(4)))
        self.how, self.values = how, values

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            value = self.values[index % len(self.values)]
            x = block(x, value) if self.how == "position" else block(x, **{self.how: value})
        return self.head(x.mean(1))


def ways(model: nn.Module) -> list[str]:
    return [half.how for stage in model.revify_plan.stages for block in stage.blocks for half in block.split_branches]


@pytest.mark.parametrize("options", [{"streams": "split"}, {"bits": 1}, {"bits": 1, "unit": "branch"}], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        lambda: Calling(ScaledByTheCaller, "position", 0.5),
        lambda: Calling(ScaledByTheCaller, "scale", 0.5, 2.0, -1),
        lambda: Calling(SwitchedByTheCaller, "act", "tanh"),
        lambda: Calling(SwitchedByTheCaller, "act", "relu", "tanh"),
    ],
)
def test_a_block_called_with_another_number_or_word_than_its_default(kind, options: dict[str, object]) -> None:
    model = converted(kind, **options)
    assert_same_gradients(model, inputs_of(kind()))
    if options.get("streams") == "split":
        assert WHOLE in ways(model)


def test_a_block_called_with_its_default_is_cut_and_says_what_is_missing_when_called_otherwise() -> None:
    model = converted(lambda: Calling(ScaledByTheCaller, "scale", 1.0), streams="split")
    assert ways(model) == [CUT] * 4
    model.values = (2.0,)
    with pytest.raises(revify.StreamError, match=r"argument scale is float, and was 1\.0 .* Plan with an example"):
        model(*model.example())


@pytest.mark.parametrize("options", [{"streams": "split"}, {"bits": 1, "unit": "branch"}], ids=str)
@pytest.mark.parametrize("kind", [lambda: zoo.Net(*(TwoMlps() for _ in range(4))), zoo.TwoAdditionsInABlock])
@pytest.mark.sampled(2)
def test_an_optimizer_may_step_within_the_backward(kind, options: dict[str, object]) -> None:
    """Each parameter is stepped as soon as its gradient is there, while other branches of its block are yet to run again."""

    def trained(plain: bool) -> list[Tensor]:
        model = converted(kind, **options)
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def at_once(parameter: nn.Parameter) -> None:
            optimizers[parameter].step()
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(at_once)
        for seed in range(2):
            x = inputs_of(model, seed)
            torch.manual_seed(seed)
            with revify.plain_backward() if plain else contextlib.nullcontext():
                model(*x).square().sum().backward()
        return [p.detach() for p in model.parameters()]

    plain = trained(plain=True)
    assert any(not torch.equal(a, b) for a, b in zip(plain, converted(kind, **options).parameters(), strict=True))
    assert all(map(torch.equal, trained(plain=False), plain))
