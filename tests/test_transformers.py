"""Small models of transformers: caches, their own switch of gradient checkpointing, inputs that are no tensors, Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from asserts import assert_same, both_ways
from torch import Tensor, nn
from torch.utils.data import Dataset

import revify

transformers = pytest.importorskip("transformers")

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
NAMED = {**WIDTHS, "vocab_size": 32}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**NAMED))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**NAMED, num_key_value_heads=1, head_dim=8))


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**NAMED, num_key_value_heads=1, sliding_window=3))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**NAMED))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**WIDTHS, image_size=16, patch_size=8))


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        num_mel_bins=4,
        max_source_positions=8,
        num_labels=2,
        classifier_proj_size=8,
    )
    return transformers.WhisperForAudioClassification(config)


WRITERS = [llama, qwen3, mistral, gpt2, t5]
OTHERS = [bert, vit, whisper]
TOKENS = torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(1))


def batch_for(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(2)
    if make in WRITERS:
        return {"input_ids": TOKENS, "labels": TOKENS}
    if make is bert:
        return {"input_ids": TOKENS, "labels": torch.tensor([0, 1])}
    if make is vit:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=numbers), "labels": torch.tensor([0, 1])}
    return {"input_features": torch.randn(2, 4, 16, generator=numbers), "labels": torch.tensor([0, 1])}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


@pytest.fixture
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_cache=True while training")
        yield


@pytest.mark.parametrize("make", [*WRITERS, *OTHERS], ids=lambda make: make.__name__)
@pytest.mark.parametrize("step", ["coded", "recurrence"])
def test_training_as_it_comes_is_that_of_ordinary_autograd(
    make: Callable[[], nn.Module], step: str, silent: None
) -> None:
    model, batch = made(make), batch_for(make)
    revify.enable(model, batch, step=step)
    both_ways(model, lambda: model(**batch).loss.backward())


@pytest.mark.parametrize("make", WRITERS, ids=lambda make: make.__name__)
def test_text_is_written_as_before(make: Callable[[], nn.Module]) -> None:
    model = made(make).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(TOKENS, **options)
    revify.enable(model, batch_for(make))
    assert torch.equal(model.generate(TOKENS, **options), expected)
    assert torch.equal(model.generate(TOKENS, use_cache=False, **options), expected)
    assert model(**batch_for(make)).past_key_values is not None
    model.train()
    with torch.no_grad():
        assert model(**batch_for(make)).past_key_values is not None


def test_there_is_no_cache_while_training_which_is_said_once() -> None:
    model, batch = made(llama), batch_for(llama)
    revify.enable(model, batch)
    with pytest.warns(UserWarning, match="use_cache=True while training") as told:
        outputs = [model(**batch) for _ in range(3)]
    assert all(output.past_key_values is None for output in outputs)
    assert sum("use_cache" in str(warning.message) for warning in told) == 1
    assert model(**batch, use_cache=False).past_key_values is None
    assert model.config.use_cache
    revify.disable(model)
    assert model(**batch).past_key_values is not None
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_filled_cache_that_is_given_in_training_is_refused(silent: None) -> None:
    model = made(llama)
    revify.enable(model, batch_for(llama))
    with torch.no_grad():
        filled = model.eval()(TOKENS[:, :3], use_cache=True).past_key_values
    model.train()
    with pytest.raises(revify.RefusalError, match=r"given past_key_values while training.*plain_backward"):
        model(TOKENS[:, 3:], labels=TOKENS[:, 3:], past_key_values=filled)
    with revify.plain_backward():
        model(TOKENS[:, 3:], labels=TOKENS[:, 3:], past_key_values=filled).loss.backward()
    assert filled.get_seq_length() == TOKENS.shape[1]
    empty = transformers.DynamicCache()
    both_ways(model, lambda: model(TOKENS, labels=TOKENS, past_key_values=empty).loss.backward())


def test_what_is_no_tensor_may_be_in_the_example() -> None:
    model = made(llama)
    example = transformers.BatchEncoding(
        {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False, "return_dict": True}
    )
    plan = revify.plan(model, example)
    assert len(plan.stages[0].blocks) == 3
    assert plan.example == ((2, 6), (2, 6))
    assert revify.convert(model, example).revify_plan == plan
    with pytest.raises(revify.RevifyError, match="a dictionary with tensors in it"):
        revify.plan(model, {"use_cache": False})


def test_the_names_of_gradient_checkpointing_keep_a_meaning() -> None:
    model = made(llama)
    model.gradient_checkpointing_enable()
    with pytest.raises(
        revify.RefusalError, match=r"one of the two is enough.*model\.gradient_checkpointing_disable\(\)"
    ):
        revify.enable(model, batch_for(llama))
    model.gradient_checkpointing_disable()
    revify.enable(model, batch_for(llama))
    with pytest.warns(UserWarning, match="recomputed already"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    revify.disable(model)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing


class Rows(Dataset[dict[str, Tensor]]):
    """Six rows of tokens."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 32, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def test_a_trainer_told_to_checkpoint_trains_as_one_that_is_not(tmp_path: Path, silent: None) -> None:
    outcomes = []
    for by_mistake in (False, True):
        model = made(llama)
        revify.enable(model, batch_for(llama))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none", bf16=True,
            gradient_checkpointing=by_mistake, save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*recomputed already")
            transformers.Trainer(model, arguments, train_dataset=Rows()).train()
        outcomes.append(model.state_dict())
    assert_same(outcomes[1], outcomes[0])
