"""A module tree knows whether anything in it became another thing, and puts back what a second run changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revify
from revify.runtime.trees import MANY, Tree
from tests.asserts import gradients


class Keeping(nn.Module):
    """A module with plain containers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.count, self.calls, self.names = 0, [1, 2], {"a"}
        self.counts: defaultdict[str, int] = defaultdict(int, {"a": 1})
        self.last: deque[int] = deque([1, 2, 3], maxlen=3)
        self.nothing: dict[str, int] = {}
        self.many = dict.fromkeys(range(MANY + 1))


def rename(keeping: Any) -> None:
    keeping.another = keeping.__dict__.pop("many")


CHANGES: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda k: setattr(k, "count", 1),
    "a name": rename,
    "a list": lambda k: k.calls.append(3),
    "an entry of a list": lambda k: k.calls.__setitem__(0, 5),
    "a set": lambda k: k.names.add("b"),
    "a dictionary with defaults": lambda k: k.counts["b"],
    "a key": lambda k: k.counts.__setitem__("b", k.counts.pop("a")),
    "a deque": lambda k: k.last.append(4),
    "what was empty": lambda k: k.nothing.update(a=1),
    "a child": lambda k: setattr(k, "layer", nn.Linear(2, 2)),
    "another child": lambda k: k.add_module("more", nn.ReLU()),
    "a parameter": lambda k: setattr(k.layer, "bias", nn.Parameter(k.layer.bias.detach())),
    "a flag": lambda k: k.layer.eval(),
    "a hook": lambda k: k.layer.register_forward_hook(lambda *_: None),
    "a class": lambda k: setattr(k, "__class__", nn.Module),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen_and_put_back_into_the_same_objects(change: Callable[[Any], object]) -> None:
    module = nn.Sequential(Keeping(), nn.ReLU())
    part: Any = module[0]
    kind = type(part)
    tree = Tree(module)
    containers = {name: value for name, value in vars(part).items() if isinstance(value, list | dict | set | deque)}
    before = {name: copy.copy(value) for name, value in containers.items()}
    with tree.again({}):
        assert tree.same()
        change(part)
        assert not tree.same()
    part.__class__ = kind  # which nothing puts back: no forward changes the class of its module
    assert tree.same()
    for name, value in containers.items():
        assert vars(part)[name] is value
        assert value == before[name]


def test_others_take_the_places_of_tensors_for_a_while() -> None:
    module = nn.BatchNorm1d(3)
    tree, own, other = Tree(module), module.running_mean, torch.ones(3)
    with tree.again({id(own): other}) as attributes:
        assert module.running_mean is other
        assert attributes == [vars(module)]
        module.momentum = 0.5
    assert module.running_mean is own
    assert module.momentum == 0.1


class Noting(nn.Module):
    """x + 2 linear layers, with what it saw last as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 4)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.one(x)
        return x + self.two(torch.tanh(self.seen))


def test_a_model_holds_nothing_that_its_modules_let_go_of() -> None:
    model = revify.convert(nn.Sequential(*(Noting() for _ in range(3))), torch.randn(2, 4))
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
    seen = [weakref.ref(block.seen) for block in model]
    for block in model:
        block.seen = None
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_that_was_trained_is_trained_by_itself(again: Callable[[Any], Any]) -> None:
    model = revify.convert(nn.Sequential(*(Noting() for _ in range(3))), torch.randn(2, 4))
    x = torch.randn(2, 4)
    model(x).sum().backward()
    for block in model:
        block.seen = None
    other = again(model)
    other.zero_grad()
    other(x).sum().backward()
    for name, gradient in gradients(other).items():
        assert torch.equal(gradient, gradients(model)[name])
