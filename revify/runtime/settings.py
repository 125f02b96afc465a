"""What torch keeps for the whole process and kernels depend on: noted at a first run, and had again at the second.

The default dtype and device, which attention kernels may run, how exact a product is, deterministic or not, how many
threads, and the weights that `torch.nn.utils.parametrize.cached` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.utils import parametrize

from revify.runtime.replay import without_graph

KERNELS = ("flash", "mem_efficient", "math", "cudnn", "overrideable", "fa3")  # of scaled_dot_product_attention
SWITCHES = (
    "cudnn_enabled",
    "cudnn_benchmark",
    "cudnn_deterministic",
    "mkldnn_enabled",
    "mkldnn_deterministic",
    "nnpack_enabled",
    "math_sdp_allow_fp16_bf16_reduction",
    "cublas_allow_fp16_accumulation",
    "deterministic_fill_uninitialized_memory",
)
PRECISE = tuple((backend, operation) for backend in ("cuda", "mkldnn") for operation in ("matmul", "conv", "rnn"))
OLDER = ("cublas_allow_tf32", "cudnn_allow_tf32", "float32_matmul_precision")  # before torch had those


@dataclass(frozen=True, slots=True)
class Setting:
    """One of them: how it is read and written."""

    read: Callable[[], Any]  # Any: each has values of its own
    write: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Settings:
    """The values of all settings at one time.

    Args:
        values: in the order of SETTINGS.
        device: on which tensors are made unless it is said otherwise.
        cached: whether, and how deep, `parametrize.cached` is entered.
        weights: those that it holds.
    """

    values: tuple[Any, ...]
    device: torch.device
    cached: int
    weights: dict[Any, Any]

    @classmethod
    def now(cls) -> Settings:
        """As they are."""
        return cls(
            tuple(setting.read() for setting in SETTINGS),
            torch.get_default_device(),
            parametrize._cache_enabled,
            {place: None if w is None else without_graph(w) for place, w in parametrize._cache.items()},
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run the body under these; what it changes is undone."""
        now = Settings.now()
        with ExitStack() as stack:
            if now.device != self.device:
                stack.enter_context(self.device)
            stack.callback(now._write, self.values)
            self._write(now.values)
            stack.callback(_hold_weights, now.cached, parametrize._cache)
            _hold_weights(self.cached, dict(self.weights))
            yield

    def _write(self, others: tuple[Any, ...]) -> None:
        for setting, mine, other in zip(SETTINGS, self.values, others, strict=True):
            if mine != other:
                setting.write(mine)


def _hold_weights(depth: int, weights: dict[Any, Any]) -> None:
    parametrize._cache_enabled, parametrize._cache = depth, weights


def _settings() -> Iterator[Setting]:
    """Those that this version of torch has."""
    yield Setting(torch.get_default_dtype, torch.set_default_dtype)
    yield Setting(torch.get_num_threads, torch.set_num_threads)
    yield Setting(_determinism, _set_determinism)
    for kernel in KERNELS:
        yield from _pair(f"_get_{kernel}_sdp_enabled", f"_set_sdp_use_{kernel}")
    yield from _pair("_get_sdp_priority_order", "_set_sdp_priority_order")
    for switch in SWITCHES:
        yield from _pair(f"_get_{switch}", f"_set_{switch}")
    for kind in ("fp16", "bf16"):
        name = f"cublas_allow_{kind}_reduced_precision_reduction"
        yield from _pair(f"_get_{name}", f"_set_{name}", several=True)
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        for which in PRECISE:
            yield Setting(
                partial(torch._C._get_fp32_precision_getter, *which),
                partial(torch._C._set_fp32_precision_setter, *which),
            )
    else:
        for name in OLDER:
            yield from _pair(f"_get_{name}", f"_set_{name}")


def _pair(read: str, write: str, *, several: bool = False) -> Iterator[Setting]:
    """The setting with this reader and this writer, where torch has both; a tuple of values may be written as such."""
    reader, writer = getattr(torch._C, read, None), getattr(torch._C, write, None)
    if reader is not None and writer is not None:
        yield Setting(reader, partial(_write_all, writer) if several else writer)


def _write_all(writer: Callable[..., None], values: Any) -> None:
    writer(*values) if isinstance(values, tuple) else writer(values)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(values: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(values[0], warn_only=values[1])


SETTINGS = tuple(_settings())
