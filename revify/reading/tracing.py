"""Module → what it does in one forward pass: its module calls and the torch.fx graph, from copies on the meta device.

Two views of the same pass, each of which the other cannot replace:

    observe   one forward pass on tensors without data: which module got which value, shapes, saved bytes
    trace     the torch.fx graph: which operations lie between two values

The user's model is never run, traced or changed; where operations have no meta implementation, a copy runs for real.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from revify.errors import RefusalError
from revify.reading.copying import copy_tree

Result = TypeVar("Result")
MAY_CHANGE = 2**20  # elements of a parameter, up to which a run of a copy has its own
Example = Sequence[Tensor] | Mapping[str, Tensor]  # a model's inputs, by position or by keyword


class Inputs(dict[str, Tensor]):
    """Inputs by keyword, with those that are no tensors beside them.

    Args:
        tensors: by keyword.
        constants: all others, the same in every run.
    """

    def __init__(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> None:  # Any: of every type
        super().__init__(tensors)
        self.constants = dict(constants)


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One call of one module in a torch.fx graph: its arguments and what it returned, as nodes where they are values."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def given(self, argument: int | str) -> Any:
        """The argument, or None where there is no such one."""
        if isinstance(argument, int):
            return self.args[argument] if argument < len(self.args) else None
        return self.kwargs.get(argument)

    def result(self, position: int | None) -> Any:
        """What it returned, or one of several results (None where the graph does not tell them apart)."""
        if position is None:
            return self.output
        return self.output[position] if isinstance(self.output, tuple | list) else None


@dataclass(frozen=True, slots=True)
class Trace:
    """A torch.fx graph and the module calls in it; `failure` says why there is none, or why it was recorded instead."""

    graph: fx.Graph | None
    calls: dict[str, list[TracedCall]]
    modules: dict[str, nn.Module]
    failure: str | None = None


def meta_copy(model: nn.Module) -> nn.Module:
    """The same module tree without data and without hooks, in train mode."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_without_data(parameter), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _without_data(buffer)
    return bare(copy_tree(model, memo, lambda kept: _without_data(kept).requires_grad_(kept.requires_grad)))


def copy_with_data(model: nn.Module) -> nn.Module:
    """The same module tree with data of its own, without hooks, in train mode; large parameters are shared.

    What a module changes when it runs (running statistics, a codebook, norms that the first batch sets) is not large.
    """
    large = (p for p in model.parameters() if p.numel() > MAY_CHANGE)
    return bare(copy_tree(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in large}, Tensor.detach))


def run_copy(model: nn.Module, example: Example, work: Callable[[nn.Module, Example], Result]) -> Result:
    """Do something to a copy of the model without data, or to one with data where an operation needs them."""
    try:
        with torch.random.fork_rng(devices=[]):  # a model may draw numbers that do not depend on its input
            return work(meta_copy(model), each_of(example, _without_data))
    except Exception as on_meta:  # any operation may lack a meta kernel; the real run below decides
        real = copy_with_data(model)
        devices = {x.device for x in (*tensors_of(example), *model.parameters()) if x.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices=sorted(devices, key=str)):
                return work(real, each_of(example, Tensor.detach))
        except Exception as error:
            raise RefusalError(
                f"{type(model).__name__} does not run on an example of shape "
                f"{[tuple(x.shape) for x in tensors_of(example)]}: {error} (without data: {on_meta}). Give inputs that it "
                "accepts: plan(model, example=images)."
            ) from error


def call_with(model: nn.Module, example: Example) -> Any:
    """Run the model forward on its inputs; what it returns."""
    if isinstance(example, Mapping):
        return model(**example, **constants_of(example))
    return model(*example)


def constants_of(example: Example) -> Mapping[str, Any]:
    """The inputs that are no tensors."""
    return example.constants if isinstance(example, Inputs) else {}


def trace(model: nn.Module, example: Example) -> Trace:
    """Trace a copy of the model with torch.fx, down to the leaf modules of torch and timm.

    Args:
        model: any module; it stays as it is.
        example: its inputs; every other argument is fixed to its default.

    Returns:
        The graph with the module calls in it, or the reason why tracing failed.
    """
    given: set[int | str] = set(example if isinstance(example, Mapping) else range(len(example)))
    return _trace(meta_copy(model), given, constants_of(example))


def defaults_left(parameters: Iterable[inspect.Parameter], given: Collection[int | str]) -> dict[str, Any]:
    """The defaults of the parameters that are not given, by position or keyword: what a trace has as constants."""
    return {
        p.name: p.default
        for position, p in enumerate(parameters)
        if p.default is not p.empty and position not in given and p.name not in given
    }


def _trace(bare: nn.Module, given: Collection[int | str], constants: Mapping[str, Any]) -> Trace:
    """Trace with timm's leaf layers; where that fails, also with its leaf blocks, which hide their own insides."""
    parameters = list(inspect.signature(bare.forward).parameters.values())
    fixed = defaults_left(parameters, given) | dict(constants)
    failure = ""
    for package in ("timm.layers", "timm"):
        tracer = _ModuleTracer(package)
        try:
            with torch.random.fork_rng(devices=[]):
                graph = tracer.trace(bare, concrete_args=fixed or None)
        except Exception as error:  # fx runs the model's own code on proxies: it may fail in any way
            failure = failure or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            continue
        tracer.calls[""] = [TracedCall("", (), {}, list(graph.nodes)[-1].args[0])]
        return Trace(graph, tracer.calls, dict(bare.named_modules()))
    return Trace(None, {}, {}, failure)


def tensors_of(example: Example) -> tuple[Tensor, ...]:
    """The inputs, in their order."""
    return tuple(example.values() if isinstance(example, Mapping) else example)


def each_of(example: Example, change: Callable[[Tensor], Tensor]) -> Example:
    if isinstance(example, Mapping):
        return Inputs({name: change(x) for name, x in example.items()}, constants_of(example))
    return [change(x) for x in example]


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def bare(model: nn.Module) -> nn.Module:
    """The model itself, without hooks and in train mode."""
    for module in model.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
    return model.train()


class _ModuleTracer(fx.Tracer):
    """torch.fx's tracer, with timm's leaf layers and functions, that also notes every module call at every depth."""

    def __init__(self, package: str) -> None:
        from timm import layers  # here: importing timm takes seconds, and only tracing needs it

        functions = tuple(layers.get_notrace_functions())
        super().__init__(autowrap_functions=functions, param_shapes_constant=True)
        self.calls: dict[str, list[TracedCall]] = {}
        self._leaves = (
            layers.DropPath,
            *(kind for kind in layers.get_notrace_modules() if kind.__module__.startswith(package)),
        )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        output = super().call_module(m, forward, args, kwargs)
        self.calls.setdefault(path, []).append(
            TracedCall(
                path,
                tuple(_node(a) for a in args),
                {name: _node(a) for name, a in kwargs.items()},
                [_node(o) for o in output] if isinstance(output, tuple | list) else _node(output),
            )
        )
        return output


def _node(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value
