"""Calibration takes what training programs have: dictionaries, loaders, batches of every size, outputs of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from asserts import assert_same_gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import revify
from revify.calibration.batches import batches_of, main_output


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Wrapped(nn.Module):
    """Keyword inputs, and outputs as `kind` says."""

    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind = zoo.PreNormBlocks(), kind

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        y = self.net(tokens if mask is None else tokens * mask)
        return self.kind(y)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None),
    "dictionary": lambda y: {"ids": y.argmax(-1), "logits": y},
    "dataclass": lambda y: Output(None, y),
    "with a loss in front": lambda y: {"loss": y.mean(), "logits": y},
    "nested": lambda y: {"heads": [{"logits": y}]},
}


def tokens(count: int = 12, length: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(count, length, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_every_kind(kind: str) -> None:
    model = revify.convert(Wrapped(KINDS[kind]), calibration={"tokens": tokens()}, predictor="diagonal", bits=1)
    plain = revify.convert(Wrapped(KINDS["tensor"]), calibration=tokens(), predictor="diagonal", bits=1)
    assert model.revify_plan.stages[0].deviation == plain.revify_plan.stages[0].deviation
    assert set(model.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_calibrate_takes_them_too(kind: str) -> None:
    model = revify.convert(Wrapped(KINDS[kind]), {"tokens": tokens(2)}, bits=1)
    fitted = revify.calibrate(model, {"tokens": tokens()}, predictor="diagonal", bits=1)
    assert fitted.revify_plan.stages[0].deviation is not None


def test_dictionaries_with_masks_and_labels() -> None:
    batch = {"tokens": tokens(), "mask": torch.ones(12, 5, 1), "labels": torch.zeros(12), "names": ["a"] * 12}
    model = revify.convert(Wrapped(KINDS["dictionary"]), calibration=[batch, batch], predictor="linear", bits=2)
    assert model.revify_plan.example == ((2, 5, 6), (2, 5, 1))
    with pytest.raises(revify.RevifyError, match=r"a batch has images, but Wrapped.forward takes tokens, mask"):
        revify.convert(Wrapped(KINDS["tensor"]), {"tokens": tokens(2)}, calibration={"images": tokens()})


def test_a_loader_needs_no_example() -> None:
    loader = DataLoader(TensorDataset(tokens(), torch.zeros(12)), batch_size=5)
    torch.manual_seed(0)
    model = revify.convert(zoo.PreNormBlocks(), calibration=loader, predictor="diagonal", bits=1)
    assert model.revify_plan.example == ((2, 5, 6),)
    assert_same_gradients(model, [tokens(3)])


def test_a_generator_is_read_once() -> None:
    def batches() -> Iterator[Tensor]:
        yield tokens()

    assert revify.convert(zoo.PreNormBlocks(), calibration=batches(), predictor="diagonal", bits=1).revify_plan.stages


def test_batches_of_different_size_and_shape() -> None:
    """Position weights are those of the positions that a batch has."""
    sizes = [tokens(7), tokens(2, 9, 2), tokens(5, 3, 3), tokens(1, 5, 4)]
    torch.manual_seed(0)
    model = revify.convert(zoo.PreNormBlocks(), calibration=sizes, predictor="linear", bits=1)
    assert_same_gradients(model, [tokens(3)])
    torch.manual_seed(0)
    alone = revify.convert(zoo.PreNormBlocks(), calibration=[tokens(2, 9, 2)], predictor="linear", bits=1)
    other = revify.convert(revify.revert(alone), tokens(2), calibration=[tokens(2, 9, 2)], predictor="linear", bits=1)
    weights = [m.blocks[2].revify_weight for m in (alone, other)]
    assert torch.equal(*weights)  # whatever the length of the example


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("images", [torch.float32, None])
def test_models_in_half_precision(dtype: torch.dtype, images: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = zoo.PreNormBlocks().to(dtype)
    fitted = revify.convert(model, calibration=tokens().to(images or dtype), predictor="linear", bits=1)
    assert fitted.blocks[1].down.weight.dtype == dtype
    assert_same_gradients(fitted, [tokens(2).to(dtype)])


def test_a_frozen_model() -> None:
    torch.manual_seed(0)
    model = zoo.PreNormBlocks().requires_grad_(False)
    trained = zoo.PreNormBlocks()
    trained.load_state_dict(model.state_dict())
    fitted = [revify.convert(m, calibration=tokens(), predictor="diagonal", bits=1) for m in (model, trained)]
    assert torch.equal(fitted[0].blocks[2].revify_scale, fitted[1].blocks[2].revify_scale)
    assert not any(p.requires_grad for p in model.parameters())


def test_convert_has_what_calibrate_has() -> None:
    torch.manual_seed(0)
    model, said = zoo.PreNormBlocks(), []
    options = {"predictor": "lowrank", "bits": 1, "rank": 2, "ridge": 0.0, "trainable": True}
    at_once = revify.convert(model, calibration=tokens(), progress=said.append, grid=10, **options)
    later = revify.calibrate(revify.convert(model, tokens(2), grid=10), tokens(), **options)
    assert said
    assert at_once.revify_plan.grid_of(at_once.revify_plan.stages[0]).resolution == 10
    assert isinstance(at_once.blocks[1].revify_up, nn.Parameter)
    assert torch.equal(at_once.blocks[1].revify_up, later.blocks[1].revify_up)
    with pytest.raises(revify.RevifyError, match="are for predictors that are fitted: give calibration="):
        revify.convert(model, tokens(2), ridge=0.0)


def test_what_is_no_data() -> None:
    model = zoo.PreNormBlocks()
    with pytest.raises(revify.RevifyError, match="there is no batch in them"):
        batches_of(model, [])
    with pytest.raises(revify.RevifyError, match="expected batches of tensors or dictionaries of tensors, got str"):
        batches_of(model, ["image.png"])
    with pytest.raises(revify.RevifyError, match="returns dict without a tensor of floats"):
        main_output({"ids": torch.zeros(2, dtype=torch.long)})


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, vocab_size=30
    )
    model = transformers.BertModel(config).eval()
    batch = {
        "input_ids": torch.randint(0, 30, (6, 7)),
        "attention_mask": torch.ones(6, 7, dtype=torch.long),
        "labels": torch.zeros(6),
    }
    fitted = revify.convert(model, calibration=[batch], predictor="diagonal", bits=1)
    assert fitted.revify_plan.stages[0].deviation is not None
