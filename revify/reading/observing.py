"""Module → its calls in one forward pass on tensors without data: which module got which value, shapes, saved bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revify.reading.tracing import Example, call_with, run_copy


@dataclass(frozen=True, slots=True)
class ValueKey:
    """One state of one tensor in an observed pass: an in-place change makes another key."""

    serial: int
    version: int


@dataclass(frozen=True, slots=True)
class TensorInput:
    """A tensor among a call's arguments.

    Args:
        argument: its position or keyword.
        key: which value it was.
        shape: its shape.
        dtype: its type.
        changed: whether the call changed it in place.
        bytes: of the memory that it keeps, which for a view is all that it is a view of.
    """

    argument: int | str
    key: ValueKey
    shape: tuple[int, ...]
    dtype: torch.dtype
    changed: bool
    bytes: int


@dataclass(frozen=True, slots=True)
class TensorResult:
    """A tensor among several that a call returned, by its position."""

    position: int
    key: ValueKey
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module.

    Args:
        path: the module's path.
        kind: its class name.
        order: position among all calls, by start.
        end: how many calls had started when it returned: those from `order` up to there lie within it.
        inputs: its tensor arguments.
        output: the value it returned, None unless that is one tensor.
        shape: of that tensor.
        dtype: of that tensor.
        saved_bytes: what autograd saved for backward within the call.
        results: the tensors among what it returned, where that is a tuple or a list.
    """

    path: str
    kind: str
    order: int
    end: int
    inputs: tuple[TensorInput, ...]
    output: ValueKey | None
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    saved_bytes: int
    results: tuple[TensorResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Observation:
    """All calls of one forward pass.

    Args:
        calls: in the order of their start.
        saved_bytes: what the whole pass saved.
        passing: values that a module was given or returned and that are gone in the end, since something changed them in place.
    """

    calls: tuple[Call, ...]
    saved_bytes: int
    passing: frozenset[ValueKey]


def observe(model: nn.Module, example: Example) -> Observation:
    """Watch one forward pass of a copy of the model, in train mode.

    Args:
        model: any module; it stays as it is.
        example: its inputs; only shapes and types matter where the model runs on the meta device.

    Returns:
        The module calls, with links between them by identity of values.

    Raises:
        RefusalError: the model does not run on inputs of these shapes.
    """
    return run_copy(model, example, lambda copied, given: _Observer().watch(copied, given))


class _Observer:
    """Notes calls, values and saved bytes while a model runs. Values stay alive, so that identities are not reused."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []
        self._serials: dict[int, int] = {}
        self._calls: list[Call] = []
        self._open: list[tuple[int, int, tuple[TensorInput, ...]]] = []
        self._started = 0
        self._saved = 0
        self._storages: set[int] = set()

    def watch(self, model: nn.Module, example: Example) -> Observation:
        parameters = list(model.parameters())
        for parameter in parameters:  # of frozen parts: what would be saved once they are trained
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        owned = [*parameters, *model.buffers()]
        self._storages = {t.untyped_storage()._cdata for t in owned}
        handles = []
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaver(path), with_kwargs=True))
        try:
            with torch.enable_grad(), saved_tensors_hooks(self._save, _read):
                call_with(model, example)
        finally:
            for handle in handles:
                handle.remove()
        calls = tuple(sorted(self._calls, key=lambda call: call.order))
        seen = {i.key for call in calls for i in call.inputs} | {
            call.output for call in calls if call.output is not None
        }
        seen |= {result.key for call in calls for result in call.results}
        return Observation(calls, self._saved, frozenset(key for key in seen if self._is_gone(key)))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = tuple(
            TensorInput(argument, self._key(value), tuple(value.shape), value.dtype, False, _kept_bytes(value))
            for argument, value in _arguments(args, kwargs)
        )
        self._open.append((self._started, self._saved, inputs))
        self._started += 1

    def _leaver(self, path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            order, saved, before = self._open.pop()
            now = [self._key(value) for _, value in _arguments(args, kwargs)]
            inputs = tuple(replace(i, changed=i.key != key) for i, key in zip(before, now, strict=True))
            one = isinstance(output, Tensor)
            several = enumerate(output) if isinstance(output, tuple | list) else ()
            results = tuple(
                TensorResult(position, self._key(value), tuple(value.shape), value.dtype)
                for position, value in several
                if isinstance(value, Tensor)
            )
            self._calls.append(
                Call(
                    path,
                    type(module).__name__,
                    order,
                    self._started,
                    inputs,
                    self._key(output) if one else None,
                    tuple(output.shape) if one else (),
                    output.dtype if one else None,
                    self._saved - saved,
                    results,
                )
            )

        return leave

    def _key(self, tensor: Tensor) -> ValueKey:
        if id(tensor) not in self._serials:
            self._alive.append(tensor)
            self._serials[id(tensor)] = len(self._alive)
        return ValueKey(self._serials[id(tensor)], tensor._version)

    def _is_gone(self, key: ValueKey) -> bool:
        return self._alive[key.serial - 1]._version != key.version

    def _save(self, tensor: Tensor) -> Tensor:
        """Autograd saves this tensor, which a backward that the model runs in its forward gets back."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse
            self._saved += _kept_bytes(tensor)
            return tensor.detach()
        if storage._cdata not in self._storages:
            self._storages.add(storage._cdata)
            self._alive.append(tensor)
            self._saved += storage.nbytes()
        return tensor.detach()


def _kept_bytes(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().nbytes()
    except NotImplementedError:  # sparse: an input that no stage can be made of
        return tensor.numel() * tensor.element_size()


def _read(kept: Tensor) -> Tensor:
    return kept


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int | str, Tensor]]:
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return ((argument, value) for argument, value in named if isinstance(value, Tensor))
