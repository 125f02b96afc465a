"""Hooks on modules within blocks: those that only look on fire as in ordinary autograd, those that change something work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import zoo
from asserts import Outcome, assert_same, converted, gradients, inputs_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune, weight_norm

import revify

Seen = list[object]


def sequence() -> nn.Module:
    """Blocks made by hand."""
    torch.manual_seed(0)
    blocks = [revify.Reversible(zoo.Mlp(3), zoo.Mlp(3), dim=-1) for _ in range(3)]
    return nn.Sequential(nn.Linear(6, 6), revify.ReversibleSequence(blocks))


def pair() -> nn.Module:
    """A function with an inverse that is given."""
    torch.manual_seed(0)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.turn(x).clone()

    turned = Turned()
    return nn.Sequential(
        nn.Linear(6, 6), revify.Invertible(turned, lambda y: y @ turned.turn.weight, tolerance=1e-3), nn.Linear(6, 6)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "coded": lambda: converted(zoo.PreNormBlocks, step="coded"),
    "coded branches": lambda: converted(zoo.PreNormBlocks, step="coded", unit="branch"),
    "recurrence": lambda: converted(zoo.PreNormBlocks),
    "split": lambda: converted(zoo.PreNormBlocks, streams="split"),
    "by hand": sequence,
}


def watched(model: nn.Module, seen: Seen, kinds: str = "before after full pre") -> nn.Module:
    """Hooks of these kinds on every module, inner ones and blocks, that note what they see."""

    def note(what: str, *values: object) -> None:
        seen.append((what, *(v.detach().clone() for v in values if isinstance(v, Tensor))))

    for name, part in model.named_modules():
        if any(part.children()):
            continue
        if "before" in kinds:
            part.register_forward_pre_hook(lambda m, args, n=name: note(f"before {n}", *args))
            part.register_forward_pre_hook(lambda m, args, kw, n=name: note(f"named {n}", *args), with_kwargs=True)
        if "after" in kinds:
            part.register_forward_hook(lambda m, args, out, n=name: note(f"after {n}", *args, out))
            part.register_forward_hook(lambda m, args, kw, out, n=name: note(f"N {n}", out), with_kwargs=True)
        if "full" in kinds:
            part.register_full_backward_hook(lambda m, into, out, n=name: note(f"full {n}", *into, *out))
        if "pre" in kinds:
            part.register_full_backward_pre_hook(lambda m, out, n=name: note(f"pre {n}", *out))
    return model


def step(model: nn.Module, plain: bool) -> Outcome:
    """One step on a copy of its own; its gradients."""
    inputs = inputs_of(model) if isinstance(model, zoo.Net) else (torch.randn(zoo.TOKENS, generator=seeded()),)
    torch.manual_seed(4)
    with revify.plain_backward() if plain else nullcontext():
        model(*(x.requires_grad_() for x in inputs)).square().sum().backward()
    return gradients(model)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def both(make: Callable[[], nn.Module], prepare: Callable[[nn.Module, Seen], object]) -> tuple[Seen, Seen]:
    """What hooks see in ordinary autograd and without it; the gradients are the same."""
    found: list[tuple[Seen, Outcome]] = []
    for plain in (True, False):
        model, seen = make(), Seen()
        prepare(model, seen)
        found.append((seen, step(model, plain)))
    assert_same(found[1][1], found[0][1])
    return found[0][0], found[1][0]


def assert_same_events(found: Seen, expected: Seen) -> None:
    """As often, in this order within a module, with the same values."""
    assert expected
    assert [event[0] for event in found] == [event[0] for event in expected]
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True)), one[0]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kinds", ["before after", "full pre", "before after full pre"])
def test_hooks_that_look_on_see_what_they_see_in_ordinary_autograd(net: str, kinds: str) -> None:
    expected, found = both(NETS[net], lambda model, seen: watched(model, seen, kinds))
    assert_same_events(found, expected)


class DeepStem(zoo.PreNormBlocks):
    """A stem of several layers, as one module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 6))


def test_hooks_in_what_is_checkpointed_fire_once() -> None:
    def make() -> nn.Module:
        model = converted(DeepStem, step="coded")
        assert "stem" in [path for checkpoint in model.revify_plan.checkpointed for path in checkpoint.paths]
        return model

    expected, found = both(make, lambda model, seen: watched(model, seen))
    assert_same_events(found, expected)


def test_hooks_within_invertible_functions_fire_once() -> None:
    seen = Seen()
    watched(pair(), seen, "before after full")(torch.randn(4, 6, requires_grad=True)).sum().backward()
    names = [event[0] for event in seen]
    assert len(names) > 6
    assert all(names.count(name) == 1 for name in names), names


@pytest.mark.parametrize("net", NETS)
def test_hooks_that_change_what_flows_are_used_in_both_runs(net: str) -> None:
    def prepare(model: nn.Module, seen: Seen) -> None:
        for name, part in model.named_modules():
            if name.endswith("up"):
                part.register_forward_hook(lambda m, args, out: out * 1.5)
                part.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
                part.register_forward_hook(lambda m, args, out, n=name: seen.append((n, out.detach().clone())))
            if name.endswith("down"):
                part.register_forward_hook(lambda m, args, out: (out.mul_(0.5), None)[1])

    expected, found = both(NETS[net], prepare)
    assert_same_events(found, expected)


@pytest.mark.parametrize("net", ["coded", "recurrence", "by hand"])
def test_hooks_that_set_weights_run_again(net: str) -> None:
    def prepare(model: nn.Module, seen: Seen) -> None:
        for name, part in list(model.named_modules()):
            if name.endswith("up"):
                weight_norm(part)  # its hook returns nothing and sets `weight`
            if name.endswith("down"):
                prune.random_unstructured(part, "weight", 0.3)

    torch.manual_seed(5)
    with pytest.warns(FutureWarning):
        both(lambda: NETS[net](), lambda model, seen: (torch.manual_seed(5), prepare(model, seen)))


def test_hooks_that_ask_for_a_gradient_run_again() -> None:
    """As transformers' own `enable_input_require_grads` does: the hook returns nothing and changes no value."""

    def prepare(model: nn.Module, seen: Seen) -> None:
        model.stem.requires_grad_(False)
        for part in model.blocks[0].modules():
            part.requires_grad_(False)
        model.blocks[0].norm.register_forward_hook(lambda m, args, out: (out.requires_grad_(True), None)[1])
        model.blocks[0].up.requires_grad_(True)

    both(NETS["coded"], prepare)


def test_a_module_that_runs_twice_in_a_block_shows_both_runs() -> None:
    class Twice(zoo.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(self.norm(self.norm(x))).relu())

    class Net(zoo.Net):
        def __init__(self) -> None:
            super().__init__(*(Twice() for _ in range(4)))

    expected, found = both(lambda: converted(Net, step="coded"), lambda model, seen: watched(model, seen))
    assert [event[0] for event in found].count("after blocks.1.norm") == 2
    assert_same_events(found, expected)


def test_a_hook_that_takes_itself_away_or_comes_in_the_forward_is_gone_or_there() -> None:
    model, calls = NETS["coded"](), []
    handle = model.blocks[1].up.register_forward_hook(lambda *_: (calls.append("once"), handle.remove())[0])

    def comes(*_: object) -> None:
        calls.append("first")
        first.remove()
        model.blocks[2].up.register_forward_hook(lambda *_: calls.append("later"))

    first = model.blocks[2].norm.register_forward_hook(comes)
    for _ in range(2):
        step(model, plain=False)
    assert calls == ["once", "first", "later", "later"]
    assert not model.blocks[1].up._forward_hooks
    assert len(model.blocks[2].up._forward_hooks) == 1


def first(values: Tensor | tuple[Tensor, ...]) -> Tensor:
    return (values if isinstance(values, Tensor) else values[0]).detach().clone()


@contextmanager
def for_all_modules(seen: Seen) -> Iterator[None]:
    handles = [
        register_module_forward_pre_hook(lambda module, args: seen.append((type(module).__name__, first(args)))),
        register_module_forward_hook(lambda module, args, out: seen.append((type(module).__name__, first(out)))),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("net", NETS)
def test_hooks_for_all_modules_fire_once(net: str) -> None:
    events = []
    for plain in (True, False):
        model, seen = NETS[net](), Seen()
        with for_all_modules(seen):
            step(model, plain)
        events.append(seen)
    assert_same_events(events[1], events[0])


@pytest.mark.parametrize("net", NETS)
def test_the_hooks_of_per_sample_gradients_agree_forward_and_backward(net: str) -> None:
    """A forward hook pushes on a list of its module and counts on its parameters; a backward hook takes away."""

    def prepare(model: nn.Module, seen: Seen) -> None:
        def push(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not hasattr(module, "given"):
                module.given = []
            module.given.append(args[0].detach())
            module.weight.calls = getattr(module.weight, "calls", 0) + 1

        def pop(module: nn.Module, into: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
            given = module.given.pop()
            module.weight.calls -= 1
            assert module.weight.calls == 0
            seen.append(("sample", torch.einsum("n...i,n...o->noi", given, out[0].detach())))

        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_hook(push)
                part.register_full_backward_hook(pop)

    expected, found = both(NETS[net], prepare)
    assert_same_events(found, expected)


def test_hooks_are_as_before_when_a_block_fails() -> None:
    model = NETS["coded"]()
    hook = model.blocks[1].up.register_forward_hook(lambda *_: None)
    model.blocks[1].down.register_forward_hook(lambda *_: 1 / 0)
    own = dict(model.blocks[1].up._forward_hooks)
    with pytest.raises(ZeroDivisionError):
        step(model, plain=False)
    assert dict(model.blocks[1].up._forward_hooks) == own
    hook.remove()
    copy.deepcopy(model)
