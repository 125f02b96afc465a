"""Training in several threads: each gets the gradients of ordinary autograd, and leaves the modules as they were."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from asserts import converted
from torch import Tensor, nn

import revify
from revify.runtime import turns
from revify.runtime.randomness import own_numbers

THREADS, STEPS = 4, 4
KINDS: list[dict[str, Any]] = [
    {"step": "coded"},
    {"step": "coded", "unit": "branch"},
    {"bits": 2},
    {"streams": "split"},
]
every_kind = pytest.mark.parametrize("options", KINDS, ids=["coded", "branch", "recurrence", "split"])


class NormedBlock(nn.Module):
    """Its forward lasts, so that threads meet in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.conv(x)))


class Normed(zoo.Net):
    """Blocks with BatchNorm, and some in the stem, which is checkpointed."""

    SHAPE = (4, 8, 6, 6)

    def __init__(self) -> None:
        super().__init__(*(NormedBlock() for _ in range(4)), width=8)
        self.stem = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class ByHand(nn.Module):
    """A sequence of reversible blocks, between the halves of the channels."""

    def __init__(self) -> None:
        super().__init__()
        branch = lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())  # noqa: E731
        self.blocks = revify.ReversibleSequence([revify.Reversible(branch(), branch()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean((2, 3))


@pytest.fixture(autouse=True)
def threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*works: Callable[[], object]) -> None:
    """All at once; what one of them raises is raised here."""
    errors: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        begin.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def slopes(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of the parameters, into no `.grad` that other threads share."""
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True))


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("make", [*(lambda o=o: converted(Normed, **o) for o in KINDS), ByHand])
def test_one_model_in_several_threads(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    inputs = [torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(THREADS)]
    with revify.plain_backward():
        expected = [slopes(model, x) for x in inputs]
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    attributes = {name: vars(part).keys() for name, part in model.named_modules()}

    def work(x: Tensor, wanted: list[Tensor]) -> None:
        for _ in range(STEPS):
            assert same(slopes(model, x), wanted)

    in_threads(*(lambda x=x, wanted=wanted: work(x, wanted) for x, wanted in zip(inputs, expected, strict=True)))
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert {name: vars(part).keys() for name, part in model.named_modules()} == attributes
    counts = {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {THREADS * STEPS}


@every_kind
def test_several_models_with_dropout_in_several_threads(options: dict[str, Any]) -> None:
    models = [converted(zoo.DropoutAndDropPath, **options) for _ in range(2)]

    def work(model: nn.Module) -> None:
        for _ in range(2 * STEPS):
            slopes(model, torch.ones(model.SHAPE))

    in_threads(*(lambda model=model: work(model) for model in models))


def test_one_model_trains_in_one_thread_and_is_looked_at_in_another() -> None:
    model = converted(Normed, step="coded").eval()
    x = torch.randn(4, 8, 6, 6)
    expected, wanted = model(x).detach(), slopes(model, x)

    def look() -> None:
        for _ in range(4 * STEPS):
            with torch.no_grad():
                assert torch.equal(model(x), expected)

    def train() -> None:
        for _ in range(STEPS):
            assert same(slopes(model, x), wanted)

    in_threads(look, train)


@pytest.mark.parametrize("make", [*(lambda o=o: converted(Normed, **o) for o in KINDS), ByHand])
def test_two_backwards_of_one_forward_in_two_threads(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    x = torch.randn(4, 8, 6, 6)
    found: dict[int, list[Tensor]] = {}
    with revify.plain_backward():
        expected = slopes(model, x)
    output = model(x)

    def work(number: int) -> None:
        gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()), retain_graph=True)
        found[number] = list(gradients)

    in_threads(lambda: work(0), lambda: work(1))
    assert same(found[0], expected)
    assert same(found[1], expected)


def test_a_backward_within_a_block_needs_no_second_turn() -> None:
    """On a GPU it goes on in a thread of its own, for which the block waits."""
    model = converted(Normed, step="coded")
    x = torch.randn(4, 8, 6, 6)
    found: list[list[Tensor]] = []

    def work() -> None:
        output = model(x)
        thread = threading.Thread(
            target=lambda: found.append(list(torch.autograd.grad(output.sum(), list(model.parameters()))))
        )
        thread.start()
        thread.join(30)
        assert not thread.is_alive()

    with turns.own_turn():
        work()
    assert len(found) == 1


def test_waiting_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    model = converted(zoo.DropoutAndDropPath)
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        with own_numbers(draws=True):
            begun.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    with pytest.raises(revify.StreamError, match=r"another thread .* for 0\.05 seconds"):
        model(torch.ones(model.SHAPE))
    done.set()
    thread.join()
    slopes(model, torch.ones(model.SHAPE))
