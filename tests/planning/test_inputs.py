"""Models in a state in which they cannot be watched are refused with one sentence, not with an error of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from asserts import assert_same_gradients, inputs_of
from torch import Tensor, nn

import revify


def scripted() -> nn.Module:
    model = zoo.PreNormBlocks()
    model.blocks[1].up = torch.jit.script(model.blocks[1].up)
    return model


def traced() -> nn.Module:
    model = zoo.PreNormBlocks()
    model.blocks[1] = torch.jit.trace(model.blocks[1], torch.randn(2, 5, 6))
    return model


def lazy() -> nn.Module:
    model = zoo.PreNormBlocks()
    model.stem = nn.LazyLinear(6)
    return model


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("ask", [revify.plan, revify.convert])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (scripted, r"PreNormBlocks holds a TorchScript module \(blocks\.1\.up\), which has no Python forward"),
        (traced, r"PreNormBlocks holds a TorchScript module \(blocks\.1\), which has no Python forward"),
        (lazy, r"the parameter stem\.weight has no shape yet \(a Lazy module\)\. Run the model once"),
    ],
)
def test_what_cannot_be_watched(ask: Callable[..., object], make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(revify.RefusalError, match=message):
        ask(make(), torch.randn(2, 5, 6))


class LoopThatKeepsWhatItSaw(zoo.ResidualsInALoop):
    """A container that is cut, kept a value with a graph, and runs on data only."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.stem(x)
        return super().forward(x + (x > 0).nonzero().sum() * 0)


def test_a_loop_in_a_model_that_kept_a_value_with_its_graph() -> None:
    torch.manual_seed(0)
    model = LoopThatKeepsWhatItSaw()
    model(*model.example())
    converted = revify.convert(model, model.example())
    assert_same_gradients(converted, inputs_of(model))
    assert not hasattr(revify.revert(converted), "revify_plan")
