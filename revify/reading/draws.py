"""Whether random numbers decide what a model does in a forward pass: skipped layers, branches left out.

A plan that was made from one such pass would depend on luck. So all generators start from the same state while a model is
analysed; where a draw may have decided something, the pass is done again with all draws as low, and as high, as they get.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from revify.reading.observing import Observation, observe
from revify.reading.tracing import Example

LOW, HIGH = 0.0, 1 - 2.0**-24  # what a draw from 0…1 can be
UNIFORM = {torch.rand, torch.rand_like}
DRAWS = {*UNIFORM, torch.randint, torch.randn, torch.randn_like, torch.randperm, torch.bernoulli, torch.multinomial}
DECISIONS = {Tensor.__bool__, Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.tolist, Tensor.__index__}


@dataclass(frozen=True, slots=True)
class Passes:
    """What a model does in its forward passes.

    Args:
        fullest: the pass that calls most modules.
        share: of the range, what its draws were; None for ordinary draws.
        skipped: the paths of modules that other passes leave out.
    """

    fullest: Observation
    share: float | None
    skipped: frozenset[str]


def observe_passes(model: nn.Module, example: Example) -> Passes:
    """Watch a forward pass of a copy of the model, and more of them where random numbers may decide about the modules.

    Args:
        model: any module; it stays as it is, and so do all generators.
        example: its inputs.

    Raises:
        RefusalError: the model does not run on inputs of these shapes.
    """
    with drawing(None) as draws:
        first = observe(model, example)
    if not draws.decided:
        return Passes(first, None, frozenset())
    passes: list[tuple[float | None, Observation]] = [(None, first)]
    for extreme in (LOW, HIGH):
        with drawing(extreme):
            passes.append((extreme, observe(model, example)))
    counts = [Counter(call.path for call in observation.calls) for _, observation in passes]
    skipped = {path for count in counts for path in count if len({other[path] for other in counts}) > 1}
    share, fullest = max(passes, key=lambda numbered: len(numbered[1].calls))
    return Passes(fullest, share, frozenset(skipped))


class Draws(TorchFunctionMode):
    """Notes whether torch's random numbers are looked at from Python; or makes them what `share` says."""

    def __init__(self, share: float | None) -> None:
        super().__init__()
        self._share = share
        self._drawn = False
        self.decided = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # Any: functions of torch take and return everything
        self._drawn = (
            self._drawn or func in DRAWS or getattr(func, "__name__", "") in ("uniform_", "bernoulli_", "random_")
        )
        self.decided = self.decided or (self._drawn and func in DECISIONS)
        result = func(*args, **(kwargs or {}))
        return result.fill_(self._share) if self._share is not None and func in UNIFORM else result


@contextmanager
def drawing(share: float | None) -> Iterator[Draws]:
    """Run the body with all generators at the same start, or with uniform draws that are all the same.

    Args:
        share: of the range; None for ordinary draws.
    """
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy is not None else None
    draws = Draws(share)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        if numpy is not None:
            numpy.random.seed(0)
        start = _host_states()
        try:
            with draws, _uniform(share):
                yield draws
            draws.decided = draws.decided or start != _host_states()
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)


@contextmanager
def _uniform(share: float | None) -> Iterator[None]:
    """Let Python's and numpy's uniform draws be this share of their range."""
    if share is None:
        yield
        return

    def between(low: float = 0.0, high: float = 1.0, *_: object, **__: object) -> float:
        return low + share * (high - low)

    def unit(*_: object, **__: object) -> float:
        return share

    places: list[tuple[Any, str, Callable[..., float]]] = [(random, "random", unit), (random, "uniform", between)]
    if (numpy := sys.modules.get("numpy")) is not None:
        places += [(numpy.random, "random", unit), (numpy.random, "rand", unit), (numpy.random, "uniform", between)]
    before = [getattr(owner, name) for owner, name, _ in places]
    try:
        for owner, name, draw in places:
            setattr(owner, name, draw)
        yield
    finally:
        for (owner, name, _), own in zip(places, before, strict=True):
            setattr(owner, name, own)


def _host_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), [str(part) for part in numpy.random.get_state()] if numpy is not None else None
