"""`Invertible`: any pair of functions that are each other's inverse, without stored activations; `is_invertible`, the check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revify.errors import RevifyError
from revify.runtime.inverting import Function, InvertedCall, Pair, tensors
from revify.runtime.states import Habits
from revify.runtime.tape import saves_nothing
from revify.runtime.torch_internals import hidden_from_compiler

TOLERANCE = 1e-4
Shape = Sequence[int]


class Invertible(nn.Module):
    """A function whose inverse is known, run without storing its input or anything else but its output.

    In backward the inverse gives the input back, and the function runs again on it. Floats promise no bits here: how far
    off what comes back is, compared with a sketch of all values, is measured in every backward, and beyond `tolerance` an
    error. Of a chain of them (`nn.Sequential`), only the last output is held. `inverse` stores no more than `forward`.

    Example:
        >>> import torch, revify
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.logs = torch.nn.Parameter(torch.zeros(6))
        ...     def forward(self, x):
        ...         return x * self.logs.exp()
        ...     def inverse(self, y):
        ...         return y / self.logs.exp()
        >>> net = torch.nn.Sequential(*(revify.Invertible(Scale()) for _ in range(3)))
        >>> net(torch.randn(2, 6)).sum().backward()

    Args:
        function: a module, a method of one, or a function without parameters; of one or several tensors.
        inverse: likewise, of what the function returns; the method `inverse` of the module where it is left out.
        tolerance: by how much an input that the inverse gives back may be off, relative to its size.

    Raises:
        RevifyError: there is no inverse, or the tolerance is no positive number.
    """

    def __init__(self, function: Function, inverse: Function | None = None, *, tolerance: float = TOLERANCE) -> None:
        super().__init__()
        undoing = getattr(function, "inverse", None) if inverse is None else inverse
        if not callable(function) or not callable(undoing):
            raise RevifyError(
                f"Invertible: {_name_of(function)} has no inverse. Give it a method `inverse`, or pass the inverse as "
                "the second argument: Invertible(function, inverse)."
            )
        if not tolerance > 0:
            raise RevifyError(f"Invertible: tolerance is {tolerance}; expected a positive number, for example 1e-4.")
        self.tolerance = tolerance
        self._habits = Habits(), Habits()  # of the function, and of the inverse
        self.function, self.undoing = function, undoing  # modules among them are children
        for name, given in (("function_of", function), ("undoing_of", undoing)):
            owner = getattr(given, "__self__", None)
            if isinstance(owner, nn.Module) and owner not in self.children():
                self.add_module(name, owner)

    @hidden_from_compiler
    def forward(self, *x: Tensor, **side: Any) -> Any:  # Any: side inputs of every type pass through
        """What the function gives for one or several tensors; keyword arguments go to both functions."""
        pair = Pair(_name_of(self.function), self, self.function, self.undoing, self.tolerance, self._habits[0])
        return _run(pair, x, side)

    @hidden_from_compiler
    def inverse(self, *y: Tensor, **side: Any) -> Any:  # Any: likewise
        """What the inverse gives, without stored activations either: in its backward the function gives y back."""
        name = f"the inverse of {_name_of(self.function)}"
        return _run(Pair(name, self, self.undoing, self.function, self.tolerance, self._habits[1]), y, side)

    def extra_repr(self) -> str:
        return f"tolerance={self.tolerance:g}"


def _run(pair: Pair, x: tuple[Tensor, ...], side: dict[str, Any]) -> Any:
    if not x or not all(isinstance(value, Tensor) for value in x):
        raise RevifyError(
            f"Invertible: expected one or several tensors, got {', '.join(type(v).__name__ for v in x) or 'nothing'}. "
            "What is no tensor goes by keyword, to both functions."
        )
    if not saves_nothing():
        return pair.function(*x, **side)
    return InvertedCall(pair, side).first(x, side)


def is_invertible(
    module: nn.Module,
    *shapes: Shape,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
    draw: Callable[..., Tensor] = torch.randn,
    seed: int = 0,
) -> bool:
    """Whether `module.inverse` undoes `module`, and the other way round, tried on random inputs.

    The module is copied before: its buffers, its modes and the random numbers stay as they are.

    Example:
        >>> import torch, revify
        >>> block = revify.Reversible(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), dim=-1, grid=16)
        >>> revify.is_invertible(block, (2, 3, 8))
        True
        >>> revify.is_invertible(torch.nn.Linear(8, 8), (2, 3, 8))
        False

    Args:
        module: called with one tensor for each shape; without a method `inverse` it is not invertible.
        shapes: of the inputs: `is_invertible(module, (2, 8))`, or one after the other.
        tolerance: by how much what comes back may be off, relative to its size.
        dtype: of the inputs.
        draw: gives an input: (*shape, dtype, device, generator) → tensor; torch.rand for positive numbers.
        seed: of the inputs.

    Raises:
        RevifyError: a shape is no tuple of whole numbers.
    """
    wanted = _shapes(shapes)
    tried: Any = copy.deepcopy(module)  # Any: that it has an inverse is what comes next
    if not callable(getattr(tried, "inverse", None)):
        return False
    like = next(tried.parameters(), torch.empty(0))
    generator = torch.Generator(like.device).manual_seed(seed)
    x = tuple(draw(*shape, dtype=dtype, device=like.device, generator=generator) for shape in wanted)
    devices = [like.device] if like.device.type not in ("cpu", "meta") else []
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=like.device.type if devices else "cuda"):
        y = tensors(tried(*(value.clone() for value in x)), type(module).__name__)
        back = tensors(tried.inverse(*(value.clone() for value in y)), "its inverse")
        if not _near(back, x, tolerance):
            return False
        return _near(tensors(tried(*back), type(module).__name__), y, tolerance)


def _name_of(function: Function) -> str:
    """The name of a function, or the class of a module."""
    return getattr(function, "__name__", type(function).__name__)


def _near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> bool:
    """Whether they are the same tensors but for a difference of this size relative to theirs."""
    if [value.shape for value in found] != [value.shape for value in expected]:
        return False
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in pairs)


def _shapes(given: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The shapes: one or several tuples of whole numbers."""
    shapes: list[Shape] = []
    for shape in given[0] if len(given) == 1 and _nested(given[0]) else given:
        if not isinstance(shape, tuple | list) or not all(type(n) is int and n >= 0 for n in shape):
            raise RevifyError(
                f"is_invertible: {shape!r} is no shape. Give a tuple of whole numbers for each input: "
                "is_invertible(module, (2, 8)) or is_invertible(module, (2, 8), (2, 3))."
            )
        shapes.append(shape)
    if not shapes:
        raise RevifyError("is_invertible: no shape. Give one for each input: is_invertible(module, (2, 8)).")
    return tuple(shapes)


def _nested(given: object) -> bool:
    return isinstance(given, tuple | list) and len(given) > 0 and isinstance(given[0], tuple | list)
