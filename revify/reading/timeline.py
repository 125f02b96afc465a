"""Module → one training step on tensors without data: what is made when, how long it lives, and what each operation costs.

    clock   0 ──── forward ────▶ turn ──── backward ────▶ end        one tick for each operation

Every value has a time at which it is made and one at which the last reference to it is gone; operations of the backward
know which operation of the forward pass they belong to. From that follows what any span of the forward pass would hold and
need, whether it is kept or run again (`Timeline.backward_peak`, …), without running anything again.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from revify.reading.tracing import Example, call_with, run_copy, tensors_of

FLOPS_A_BYTE = {"cpu": 10.0, "cuda": 60.0}  # about: what is computed in the time in which one byte is moved
DEPTHWISE_COPIES = 257  # of the weights, in the backward of wide depthwise kernels on a CPU, channels last


@dataclass(frozen=True, slots=True)
class Value:
    """Memory that an operation of the step made.

    Args:
        bytes: of it.
        born: when it was made.
        died: when it was let go.
        saved: when autograd saved it in forward.
    """

    bytes: int
    born: int
    died: int
    saved: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """One call of a module, from one time to another, with the values that it was given and returned.

    Args:
        start: when it began.
        end: when it had returned.
        given: places in the timeline's values; what was there before the step, as parameters, is not listed.
        returned: the same of what it returned.
    """

    start: int
    end: int
    given: tuple[int, ...]
    returned: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """One training step.

    Args:
        turn: when the backward began.
        values: everything that was made, in the order of birth.
        spans: the calls of modules, in the order of their start.
        source: for each time of the backward, the time in forward of the operation that it belongs to.
        work: for each time, what the operation costs: floating-point operations, and bytes moved in their equivalent.
        workspace: for each time, bytes that the kernel itself takes while it runs.
    """

    turn: int
    values: tuple[Value, ...]
    spans: tuple[Span, ...]
    source: tuple[int, ...]
    work: tuple[float, ...]
    workspace: tuple[int, ...]

    @property
    def end(self) -> int:
        """How many times there are."""
        return len(self.work)


def draw_timeline(model: nn.Module, example: Example, *, training: bool = True, device: str = "cpu") -> Timeline:
    """Run one training step of a copy of the model without data.

    Args:
        model: any module; it stays as it is.
        example: its inputs; only shapes and types matter where the model runs on the meta device.
        training: with a backward; else the forward pass alone, without gradients.
        device: on which it will be trained, "cpu" or another.

    Raises:
        RefusalError: the model does not run on inputs of these shapes.
    """
    return run_copy(model, example, lambda copied, given: _Recorder(device).watch(copied, given, training=training))


@dataclass(slots=True)
class _Birth:
    bytes: int
    born: int
    died: int | None = None
    saved: list[int] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch says no types of it
    """Keeps the clock, and notes what is made and let go."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._births: list[_Birth] = []
        self._alive: dict[int, int] = {}  # address of a storage → place among the births; −1: was there before
        self._work: list[float] = []
        self._workspace: list[int] = []
        self._sequence: list[int] = []  # autograd's number after each operation of the forward pass
        self._source: list[int] = []
        self._turn: int | None = None
        self._open: list[tuple[int, int, tuple[int, ...]]] = []
        self._spans: dict[int, Span] = {}

    def watch(self, model: nn.Module, example: Example, *, training: bool) -> Timeline:
        parameters = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
        if not any(p.requires_grad for p in parameters):
            model.requires_grad_(True)
        self._alive = {_address(t): -1 for t in (*model.parameters(), *model.buffers(), *tensors_of(example))}
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(self._leave, always_call=False)
        with self, _FusedAttention(), torch.set_grad_enabled(training):
            with saved_tensors_hooks(self._save, _read):
                output = call_with(model, example)
            self._turn = len(self._work)
            results = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            del output
            if results:
                torch.autograd.backward(results, [torch.empty_like(t) for t in results])
            del results
        return self._timeline()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        time = len(self._work)
        if self._turn is not None:
            self._source.append(self._source_now())
        kwargs = kwargs or {}
        self._work.append(0.0)
        self._workspace.append(0)
        result = func(*args, **kwargs)
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        new = [t for t in made if self._note(t, time)]
        if new or func._schema.is_mutable:
            self._work[time] = self._cost(func, args, kwargs, result, new)
            self._workspace[time] = _workspace(func, args, result) if self._device == "cpu" else 0
        if self._turn is None:
            self._sequence.append(torch._C._autograd._get_sequence_nr())
        return result

    def _note(self, tensor: Tensor, time: int) -> bool:
        """Whether this is memory that was not there before."""
        address = _address(tensor)
        if not address or address in self._alive:
            return False
        storage = tensor.untyped_storage()
        self._alive[address] = len(self._births)
        self._births.append(_Birth(storage.nbytes(), time))
        weakref.finalize(storage, self._let_go, address)
        return True

    def _let_go(self, address: int) -> None:
        self._births[self._alive.pop(address)].died = len(self._work) - 1

    def _cost(self, func: Any, args: Any, kwargs: Any, result: Any, new: list[Tensor]) -> float:
        moved = sum(t.numel() * t.element_size() for t in (*pytree.tree_leaves(args), *new) if isinstance(t, Tensor))
        packet = func._overloadpacket
        flops = float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            flops = 4.0 * args[0].numel() * args[1].shape[-2]
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            flops = 10.0 * args[1].numel() * args[2].shape[-2]
        return flops + moved * FLOPS_A_BYTE.get(self._device, FLOPS_A_BYTE["cuda"])

    def _source_now(self) -> int:
        """When in forward the operation ran whose backward is running."""
        node: Any = torch._C._current_autograd_node()
        before = self._source[-1] if self._source else len(self._sequence)
        if node is None or type(node).__name__ == "AccumulateGrad":
            return before
        return min(bisect_right(self._sequence, node._sequence_nr()), len(self._sequence))

    def _save(self, tensor: Tensor) -> Tensor:
        place = self._alive.get(_address(tensor), -1)
        if place >= 0:
            self._births[place].saved.append(len(self._work) - 1)
        return tensor.detach()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = len(self._spans) + len(self._open)
        self._open.append((number, len(self._work), self._places((args, kwargs))))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        number, start, given = self._open.pop()
        self._spans[number] = Span(start, len(self._work), given, self._places(output))

    def _places(self, values: Any) -> tuple[int, ...]:
        found = (self._alive.get(_address(t), -1) for t in pytree.tree_leaves(values) if isinstance(t, Tensor))
        return tuple(dict.fromkeys(place for place in found if place >= 0))

    def _timeline(self) -> Timeline:
        end = len(self._work)
        turn = end if self._turn is None else self._turn
        values = tuple(Value(b.bytes, b.born, end if b.died is None else b.died, tuple(b.saved)) for b in self._births)
        spans = tuple(self._spans[number] for number in sorted(self._spans))
        return Timeline(turn, values, spans, tuple(self._source), tuple(self._work), tuple(self._workspace))


def _workspace(func: Any, args: Any, result: Any) -> int:
    """What a convolution on a CPU takes for its own: copies in the order that its kernel wants (measured, torch 2.14)."""
    if func is torch.ops.aten.convolution.default:
        return max(_size(args[0]) + _size(args[1]), _size(result))
    if func is torch.ops.aten.convolution_backward.default:
        gradient, x, weight, wanted = args[0], args[1], args[2], args[10]
        if weight.shape[1] == 1 and weight[0].numel() > 9 and gradient.is_contiguous(memory_format=torch.channels_last):
            return DEPTHWISE_COPIES * _size(weight)
        return max(_size(gradient) + (_size(x) if wanted[0] else 0), _size(weight))
    return 0


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _FusedAttention(TorchFunctionMode):
    """Lets attention save what its fused kernels save: without a device, torch would take it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and not kwargs.get("enable_gqa"):
            named = (
                dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
            )
            q, k, v, mask = (named.get(name) for name in ("query", "key", "value", "attn_mask"))
            same = q.is_meta and q.dim() == 4 and q.shape[-1] == v.shape[-1] and q.dtype == k.dtype == v.dtype
            plain = mask is None or (not mask.requires_grad and mask.dim() in (2, 4))
            if same and plain and not named.get("dropout_p"):
                more = {"attn_mask": mask, "scale": named.get("scale")}
                fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                return fused(q, k, v, 0.0, bool(named.get("is_causal")), **more)[0]
        return func(*args, **kwargs)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse
        return 0


def _read(kept: Tensor) -> Tensor:
    return kept


def _forget(parameter: Tensor) -> None:
    """A gradient is added to what is there, and is gone."""
    parameter.grad = None
