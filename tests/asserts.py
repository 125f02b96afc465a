"""Helpers that run a model and assert. The oracle is the same converted model under ordinary autograd, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import revify

Outcome = dict[str, Tensor]


def run(
    model: nn.Module,
    inputs: Sequence[Tensor],
    *,
    plain: bool = False,
    autocast: torch.dtype | None = None,
    seed: int = 1,
) -> Outcome:
    """One forward and backward from one seed: output, gradients of inputs and parameters, buffers afterwards.

    The model's buffers are as before when this returns, so that two runs start alike.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with revify.plain_backward() if plain else nullcontext():
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = model(*given)
        (output.float() * weights_like(output)).sum().backward()
    outcome = {"output": output.detach().clone()}
    outcome |= {f"input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    outcome |= gradients(model)
    outcome |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if buffer.shape == buffers[name].shape:  # else a table that the model makes at its first call
                buffer.copy_(buffers[name])
    return outcome


def gradients(model: nn.Module) -> Outcome:
    return {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def weights_like(output: Tensor) -> Tensor:
    """Other weights for every element, so that no element's gradient can stand for another's."""
    return torch.linspace(-1, 2, output.numel()).view(output.shape)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, the same bits."""
    assert found.keys() == expected.keys()
    different = {n: difference(found[n], expected[n]) for n in expected if not torch.equal(found[n], expected[n])}
    assert not different, f"{len(different)} of {len(expected)} differ, by up to: {different}"


def difference(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape or not left.numel():
        return float("inf")
    return float((left.double() - right.double()).abs().max())


def assert_same_gradients(
    model: nn.Module, inputs: Sequence[Tensor], *, autocast: torch.dtype | None = None, seed: int = 1
) -> Outcome:
    """A converted model's memory-free backward gives what ordinary autograd gives on it, and gives something."""
    expected = run(model, inputs, plain=True, autocast=autocast, seed=seed)
    found = run(model, inputs, autocast=autocast, seed=seed)
    trained = {f"grad {name}" for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= expected.keys(), f"no gradient at all for {trained - expected.keys()}"
    for stage in model.revify_plan.stages:
        for block in stage.blocks:
            inside = [n for n in trained if n.startswith(f"grad {block.path}.")]
            assert not inside or any(expected[n].any() for n in inside), f"{block.path} has zero gradients"
    assert_same(found, expected)
    return found


def both_ways(model: nn.Module, steps: Callable[[], None]) -> None:
    """Whatever `steps` do with the model, the parameters' gradients come out the same in both backwards."""
    state = copy.deepcopy(model.state_dict())
    outcomes = []
    for plain in (True, False):
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        with revify.plain_backward() if plain else nullcontext():
            steps()
        outcomes.append({**gradients(model), **{n: b.clone() for n, b in model.named_buffers()}})
    assert any(g.any() for g in outcomes[0].values())
    assert_same(outcomes[1], outcomes[0])


def converted(kind: Callable[[], nn.Module], **options: object) -> nn.Module:
    """A converted network of the zoo, the same one at every call; of reversible steps where nothing else is said."""
    options = {"step": "recurrence", **options} if "streams" not in options else options
    torch.manual_seed(0)
    model = kind()
    return revify.convert(model, model.example(), **options)


def inputs_of(model: nn.Module, seed: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return model.example()


class Count:
    """A counter that revify does not put back for a second run: no plain attribute of a module."""

    def __init__(self) -> None:
        self.number = 0

    def up(self) -> int:
        self.number += 1
        return self.number


class Unchanged:
    """Context: a model's parameters, buffers, modes, hooks, attributes, and the random numbers stay as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = self._state()
        self.random = torch.get_rng_state()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and kind is not revify.RefusalError:
            return
        assert torch.equal(self.random, torch.get_rng_state()), "random numbers were drawn"
        after = self._state()
        assert after.keys() == self.before.keys()
        for name, (value, identity) in self.before.items():
            now, then = after[name]
            assert then == identity, f"{name} is another object"
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value, name

    def _state(self) -> dict[str, tuple[object, int]]:
        state: dict[str, tuple[object, int]] = {}
        for path, module in self.model.named_modules():
            state[f"{path} class"] = (type(module), id(module))
            for name, value in vars(module).items():
                if isinstance(value, dict):
                    for key, item in value.items():
                        saved = item.clone() if isinstance(item, Tensor) else repr(type(item))
                        state[f"{path}.{name}[{key!r}]"] = (saved, id(item))
                else:
                    state[f"{path}.{name}"] = (copy.copy(repr(value)), 0)
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            state[f"{name} flags"] = (str((tensor.requires_grad, tensor.grad is None, tensor._version)), 0)
        return state
