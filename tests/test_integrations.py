"""Trainers and adapters of other libraries, with real objects of theirs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asserts import assert_same, both_ways
from test_transformers import TOKENS, Rows, batch_for, llama, made
from torch import Tensor, nn
from torch.utils.data import DataLoader

import revify

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
lightning = pytest.importorskip("lightning.pytorch")


@pytest.fixture(autouse=True)
def _silent() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_cache=True while training")
        warnings.filterwarnings("ignore", message=".*(recomputed already|recomputes the blocks)")
        yield


# transformers' Trainer


def trained(folder: Path, make: Callable[[], nn.Module], callbacks: list[Any], **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(make(), arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize("by_mistake", [False, True])
def test_a_callback_converts_the_model_of_a_trainer_while_it_trains(tmp_path: Path, by_mistake: bool) -> None:
    from revify.integrations.transformers import RevifyCallback

    def converted() -> nn.Module:
        model = made(llama)
        revify.enable(model, batch_for(llama), bits=4)
        return model

    seen: list[bool] = []

    class Looks(transformers.TrainerCallback):
        def on_step_end(self, *given: Any, model: nn.Module, **kwargs: Any) -> None:
            seen.append(hasattr(model, "revify_plan"))

    callback = RevifyCallback(batch_for(llama), bits=4)
    trainer = trained(tmp_path, lambda: made(llama), [callback, Looks()], gradient_checkpointing=by_mistake)
    assert_same(trainer.model.state_dict(), trained(tmp_path, converted, []).model.state_dict())
    assert seen == [True] * 3
    assert not hasattr(trainer.model, "revify_plan")
    trainer.train()
    assert len(seen) == 6
    assert all(seen)


# Lightning


class Regression(lightning.LightningModule):
    """The zoo's network with its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = zoo.PreNormBlocks()
        self.was_converted: list[bool] = []

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        self.was_converted.append(hasattr(self.network, "revify_plan"))
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def test_a_callback_converts_a_network_of_lightning_while_it_is_fitted() -> None:
    from revify.integrations.lightning import RevifyCallback

    rows = [(torch.randn(5, 6), torch.randn(3)) for _ in range(6)]

    def fitted(plain: bool) -> Regression:
        module = Regression()
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[RevifyCallback("network", torch.randn(2, 5, 6))],
        )  # fmt: skip
        with revify.plain_backward() if plain else torch.enable_grad():
            trainer.fit(module, DataLoader(rows, batch_size=2))
        return module

    module = fitted(plain=False)
    assert module.was_converted == [True] * 6
    assert not hasattr(module.network, "revify_plan")
    assert_same(module.state_dict(), fitted(plain=True).state_dict())


# PEFT


def lora() -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)


def adapted(order: str, **options: Any) -> nn.Module:
    """A small Llama with adapters that are no longer zero, in one of the orders."""
    model, batch = made(llama), batch_for(llama)
    if order == "convert first":
        revify.enable(model, batch, **options)
    model = peft.get_peft_model(model, lora())
    if order == "adapters first":
        revify.enable(model, batch, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.train()


@pytest.mark.parametrize("order", ["convert first", "adapters first"])
@pytest.mark.parametrize("options", [{}, {"unit": "branch"}, {"step": "recurrence"}], ids=str)
def test_every_adapter_gets_its_gradient_in_either_order(order: str, options: dict[str, Any]) -> None:
    model, batch = adapted(order, **options), batch_for(llama)
    both_ways(model, lambda: model(**batch).loss.backward())
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 3 * 3 * 2
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("order", ["convert first", "adapters first"])
def test_adapters_are_saved_loaded_and_merged(order: str, tmp_path: Path) -> None:
    model = adapted(order)
    model.save_pretrained(tmp_path)
    model.eval()
    expected = model(TOKENS).logits
    loaded = peft.PeftModel.from_pretrained(made(llama), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, expected)
    root = model.base_model.model if order == "convert first" else model
    revify.disable(root)
    assert torch.equal(model(TOKENS).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, expected)  # the sum of two products, in one
    assert type(merged) is type(made(llama))
    assert not any("lora" in name for name in merged.state_dict())


def test_a_model_prepared_for_training_with_few_bits() -> None:
    """It is frozen, its norms are in float32, and the inputs of its blocks have a gradient."""
    model = peft.prepare_model_for_kbit_training(made(llama), use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, lora())
    revify.enable(model, batch_for(llama))
    both_ways(model, lambda: model(**batch_for(llama)).loss.backward())
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
