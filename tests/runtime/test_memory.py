"""Between forward and backward live two stream values and the packed bits, at any depth; afterwards nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from asserts import converted, inputs_of
from ledger import Ledger
from torch import nn

import revify
from revify.runtime.tape import Tape

STREAM = 2 * 50 * 32 * 4  # bytes of one stream value of the network below


class TiedBlocks(zoo.Net):
    """All blocks share their parameters, so that only activations can grow with depth."""

    SHAPE = (2, 50, 32)

    def __init__(self, depth: int) -> None:
        block = zoo.Mlp(32)
        blocks = []
        for _ in range(depth):
            copy = zoo.Mlp(32)
            for name in ("norm", "up", "down"):
                setattr(copy, name, getattr(block, name))
            blocks.append(copy)
        super().__init__(*blocks)


def held(depth: int, bits: int, predictor: str = "identity") -> tuple[int, int]:
    """Bytes alive between forward and backward, and the most during backward."""
    model = converted(lambda: TiedBlocks(depth), bits=bits, predictor=predictor)
    x = inputs_of(model)[0]
    with Ledger() as ledger:
        loss = model(x).sum()
        between = ledger.alive()
        ledger.most = 0
        loss.backward()
    return between, ledger.most


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed here is freed by reference counts: nothing may wait for the collector of cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("predictor", ["identity", "midpoint"])
def test_no_bits_hold_two_values_at_any_depth(predictor: str, no_collector: None) -> None:
    few, many = held(4, 0, predictor), held(24, 0, predictor)
    per_block = 64  # a checksum of 4 bytes, and slack
    assert many[0] - few[0] <= 20 * per_block
    assert many[1] - few[1] <= 20 * per_block
    outside = 3 * STREAM  # what stem, head and loss hold
    assert 2 * STREAM <= few[0] <= 2 * STREAM + outside


def test_plain_backward_holds_more_with_each_block(no_collector: None) -> None:
    with revify.plain_backward():
        few, many = held(4, 0), held(24, 0)
    assert many[0] - few[0] > 20 * 4 * STREAM


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.sampled(3)
def test_each_block_holds_its_bits(bits: int, no_collector: None) -> None:
    few, many = held(4, bits), held(24, bits)
    residue = STREAM // 4 * bits // 8
    assert 20 * residue <= many[0] - few[0] <= 20 * (residue + 64)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tape]]:
    """Every tape made in the test."""
    made: list[weakref.ref[Tape]] = []

    class Watched(Tape):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr("revify.runtime.steps.Tape", Watched)
    return made


@pytest.mark.parametrize("kind", [zoo.PreNormBlocks, zoo.SideInputsWithGradient, zoo.StreamIsASideInput])
def test_tape_is_gone_after_backward(kind: type[zoo.Net], tapes: list[weakref.ref[Tape]], no_collector: None) -> None:
    model = converted(kind, bits=2)
    loss = model(*inputs_of(model)).sum()
    assert [tape() is not None for tape in tapes] == [True]
    loss.backward()
    assert [tape() for tape in tapes] == [None]


def test_tape_is_gone_when_the_output_is_dropped(tapes: list[weakref.ref[Tape]], no_collector: None) -> None:
    model = converted(zoo.PreNormBlocks, bits=2)
    output = model(*inputs_of(model))
    del output
    assert [tape() for tape in tapes] == [None]


def test_tape_is_gone_after_double_backward(tapes: list[weakref.ref[Tape]], no_collector: None) -> None:
    model = converted(zoo.PreNormBlocks)
    x = inputs_of(model)[0].requires_grad_()
    loss = model(x).square().sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    slope.square().sum().backward()
    del slope, loss
    assert [tape() for tape in tapes] == [None]


def test_nothing_is_kept_without_gradients(tapes: list[weakref.ref[Tape]], no_collector: None) -> None:
    model = converted(zoo.PreNormBlocks, bits=2)
    x = inputs_of(model)
    with torch.no_grad(), Ledger() as ledger:
        output = model(*x)
        assert ledger.alive() == output.numel() * 4
    assert [tape() for tape in tapes] == [None]


def test_no_state_stays_in_the_modules() -> None:
    model = converted(zoo.DropoutAndDropPath)
    before = [sorted(vars(m)) for m in model.modules()]
    step = vars(model.blocks[1].forward).copy()
    model(*inputs_of(model)).sum().backward()
    assert [sorted(vars(m)) for m in model.modules()] == before
    assert vars(model.blocks[1].forward) == step


def test_copies_and_saved_values_leave_the_forward_pass() -> None:
    """A value between two blocks can be copied and pickled; the copy is an ordinary tensor."""
    import copy
    import io

    model: nn.Module = converted(zoo.PreNormBlocks)
    with torch.no_grad():
        value = model.blocks[0](model.stem(*inputs_of(model)))
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    for other in (copy.deepcopy(value), torch.load(file, weights_only=False)):
        assert torch.equal(other, value)
        with pytest.raises(revify.StreamError, match=r"its input is not the output of blocks.0"):
            model.blocks[1](other)
    model.blocks[1](value)
