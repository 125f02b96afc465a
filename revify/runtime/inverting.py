"""A pair of functions that are each other's inverse: the input of one is freed, and had again through the other.

Forward. The function runs under hooks that drop what autograd saves (`reruns`). Its call keeps its outputs and, of each
input, a sketch of all values. Where an output is the input of another such call, that call hands it back in backward, so
that of a chain only the last outputs are kept.

Backward. When autograd first needs something that was dropped, the inverse gives the inputs, the sketches say how far off
they are, and the function runs again on them.

Floats promise no bits here: what comes back is the input but for the rounding of both functions, and gradients are off by
about as much. The caller states how much is allowed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revify.errors import ReplayError, StreamError
from revify.runtime.conditions import drop_weight_copies
from revify.runtime.guards import in_the_end
from revify.runtime.links import Rider
from revify.runtime.replay import SideInputs, version
from revify.runtime.reruns import Rerun
from revify.runtime.states import Habits
from revify.runtime.tape import Value, with_strides

CHUNKS = 256  # of a tensor, each of which gives one number of its sketch

Function = Callable[..., Any]  # Any: tensors or a tuple of them, and side inputs of every type


@dataclass(frozen=True, slots=True)
class Pair:
    """A function and its inverse.

    Args:
        name: for errors.
        module: whose parameters, buffers and modes are involved.
        function: of one or several tensors.
        inverse: of what that returns.
        tolerance: how far off an input may be that the inverse gives, relative to its size.
        habits: what a run of the function is known to change.
    """

    name: str
    module: nn.Module
    function: Function
    inverse: Function
    tolerance: float
    habits: Habits


class HandedOn(Rider):
    """Rides on an output of a call, so that a call on it can take it over."""

    __slots__ = ("call", "place", "version")

    def __init__(self, call: InvertedCall, place: int, version: int) -> None:
        self.call, self.place, self.version = call, place, version


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Stands for an output that is the input of another call, which gives it back."""

    call: InvertedCall
    place: int


@dataclass(frozen=True, slots=True)
class Input:
    """What a call keeps of an input.

    Args:
        sketch: of its values.
        needs_grad: whether it had a gradient.
        stride: which its reconstruction must have too: kernels depend on it.
        giver: the call of which it is an output, and which of them; not held, or the two would hold each other.
    """

    sketch: Tensor
    needs_grad: bool
    stride: tuple[int, ...]
    giver: tuple[weakref.ref[InvertedCall], int] | None


class InvertedCall:
    """One call of a function, whose inputs are had again from its outputs."""

    def __init__(self, pair: Pair, side: dict[str, Any]) -> None:
        self.pair = pair
        self._inputs: list[Input] = []
        run = partial(_back_and_forth, pair, self._inputs)  # not of this call, or the two would hold each other
        self._rerun = Rerun(pair.name, run, pair.module, SideInputs.of((), side), pair.habits, exact=False)
        self._outputs: dict[int, Value] = {}
        self._taken: dict[int, TakenOver] = {}
        self._given_back: dict[int, Tensor] = {}  # of what was taken over
        self._drifts: list[tuple[str, Tensor]] = []

    def first(self, x: tuple[Tensor, ...], side: dict[str, Any]) -> Any:
        """Run the function, saving nothing."""
        versions = [version(value) for value in x]
        self._inputs += [self._take(value, place) for place, value in enumerate(x)]
        result = self._rerun.first(lambda: self.pair.function(*x, **side), x[0].device, self.load)
        if [version(value) for value in x] != versions:
            raise StreamError(
                f"{self.pair.name} changes its input in place, so the input cannot be freed. Make its first operation an "
                "out-of-place one (for activations inplace=False)."
            )
        for place, value in enumerate(tensors(result, self.pair.name)):
            self._outputs[place] = Value(value.detach(), version(value))
            value.revify_call = HandedOn(self, place, version(value))  # type: ignore[attr-defined]
        return result

    def load(self) -> None:
        """Have what the function saved."""
        with torch.no_grad():
            outputs = self._known_outputs()
            given, result = self._rerun.again(*outputs, catch=True)
            for kept, value in zip(self._inputs, given, strict=True):
                self._note("what its inverse gave back", sketch(value), kept.sketch)
                giver = kept.giver[0]() if kept.giver is not None else None
                if kept.giver is not None and giver is not None:
                    giver.give_back(kept.giver[1], value.detach())
            for value, expected in zip(tensors(result, self.pair.name), outputs, strict=True):
                self._note("its second run", sketch(value), sketch(expected))
        in_the_end(partial(_check, self.pair, self._drifts))

    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs once more, for a backward that did not come from behind this call."""
        given, _ = self._rerun.again(*self._known_outputs(), catch=False)
        return tuple(value.detach() for value in given)

    def hand_over(self, place: int, taken: TakenOver) -> None:
        """Let go of an output, which another call will give back."""
        self._outputs.pop(place, None)
        self._taken[place] = taken

    def give_back(self, place: int, value: Tensor) -> None:
        """The value of an output that was taken over, for the load of this call that is next."""
        self._given_back[place] = value

    def forget(self) -> None:
        """Let go of saved tensors that nobody asked for."""
        self._rerun.forget()

    def _known_outputs(self) -> list[Tensor]:
        known = {place: value.checked(self.pair.name) for place, value in self._outputs.items()}
        for place, taken in self._taken.items():
            taken.call.forget()
            back = self._given_back.pop(place, None)
            known[place] = taken.call.inputs()[taken.place] if back is None else back
        return [known[place] for place in sorted(known)]

    def _take(self, value: Tensor, place: int) -> Input:
        """What is kept of an input; where it is the output of another call, that call lets go of it."""
        handed = handed_on(value)
        giver = None
        if handed is not None and handed.version == version(value):
            handed.call.hand_over(handed.place, TakenOver(self, place))
            giver = weakref.ref(handed.call), handed.place
        return Input(sketch(value), value.requires_grad, value.stride(), giver)

    def _note(self, what: str, found: Tensor, expected: Tensor) -> None:
        """How far off a value is; nothing where it was not finite, as in the plain model."""
        size = expected[-1]
        drift = (found[:-1] - expected[:-1]).norm() / size.clamp_min(torch.finfo(size.dtype).tiny)
        self._drifts.append((what, torch.where(size.isfinite(), drift, 0)))


def handed_on(value: Tensor) -> HandedOn | None:
    """What rides on a tensor, or on the one of which it is an alias, as full backward hooks make it."""
    base = value._base if value._base is not None and value._base.shape == value.shape else value
    found: HandedOn | None = value.__dict__.pop("revify_call", None) or base.__dict__.pop("revify_call", None)
    return found


def tensors(result: object, name: str) -> tuple[Tensor, ...]:
    """What a function gave, as a tuple."""
    given = tuple(result) if isinstance(result, tuple | list) else (result,)
    if not given or not all(isinstance(value, Tensor) for value in given):
        raise StreamError(
            f"{name} gave {', '.join(type(value).__name__ for value in given) or 'nothing'}: expected a tensor or a tuple of "
            "tensors, from which its inverse gives the inputs back."
        )
    return given


def sketch(value: Tensor) -> Tensor:
    """Some numbers whose change is about as large as that of the whole tensor, and its size, in a flat tensor.

    Up to CHUNKS weighted sums, in which every value counts; the squares of the weights are 1 on average.
    """
    flat = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
    flat = flat.reshape(-1).to(torch.promote_types(flat.dtype, torch.float32))
    width = max(1, flat.numel() // CHUNKS)
    rows = flat.numel() // width
    weights = torch.arange(width, dtype=flat.dtype, device=flat.device).cos() * 2**0.5
    whole, rest = flat[: rows * width].view(rows, width), flat[rows * width :]
    return torch.cat([whole @ weights, rest, flat.norm()[None]])


def _back_and_forth(pair: Pair, inputs: list[Input], *outputs: Tensor, **side: Any) -> tuple[tuple[Tensor, ...], Any]:
    """The inputs, by the inverse, and what the function gives for them."""
    own = saved_tensors_hooks(Tensor.detach, lambda kept: kept)  # for an inverse that runs a backward of its own
    with torch.no_grad(), own, _random_numbers_afterwards(outputs[0].device):
        found = tensors(pair.inverse(*outputs, **side), f"the inverse of {pair.name}")
    drop_weight_copies(outputs[0].device)  # torch 2.8 makes them without a gradient here, and would use them below
    if len(found) != len(inputs):
        raise StreamError(f"the inverse of {pair.name} gave {len(found)} tensors, but {len(inputs)} went in.")
    given = tuple(
        with_strides(value, kept.stride).detach().requires_grad_(kept.needs_grad)
        for value, kept in zip(found, inputs, strict=True)
    )
    return given, pair.function(*given, **side)


@contextmanager
def _random_numbers_afterwards(device: torch.device) -> Iterator[None]:
    """Leave the random numbers as they are, whatever the body draws."""
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def _check(pair: Pair, drifts: list[tuple[str, Tensor]]) -> None:
    """Refuse gradients from inputs that are too far off; `drifts` is empty afterwards."""
    if not drifts:
        return
    found = torch.stack([drift.double() for _, drift in drifts]).tolist()
    kinds = [what for what, _ in drifts]
    drifts.clear()
    for what, drift in zip(kinds, found, strict=True):
        if not drift <= pair.tolerance:
            raise ReplayError(
                f"{pair.name}: {what} in backward is off by {drift:.1e} of its size, more than tolerance={pair.tolerance:g}, "
                "so the gradients just computed are not to be trusted: discard them. Either the functions are not each "
                "other's inverse (revify.is_invertible tells), or they magnify rounding errors: state a larger tolerance, "
                "or use float64. Or they do not repeat themselves: random numbers, a state of their own, parameters changed "
                "between forward and backward."
            )
