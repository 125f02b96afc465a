"""One coupling with its branches: what it computes, in either direction, under ordinary autograd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revify.couplings.deriving import Coupling
from revify.couplings.programs import Apply, Call, names
from revify.errors import StreamError
from revify.runtime.numbers import Numbers
from revify.runtime.replay import version
from revify.runtime.states import Habits

Values = dict[str, Tensor]
Sides = Mapping[str, Mapping[str, Any]]  # Any: side inputs of every type pass through


@dataclass(frozen=True, slots=True)
class Layer:
    """One coupling of the sequence.

    Args:
        name: for errors.
        coupling: with its inverse.
        branches: by their letters in the formula.
        sides: keyword arguments of each branch.
        habits: what each branch is known to change when it runs.
    """

    name: str
    coupling: Coupling
    branches: Mapping[str, nn.Module]
    sides: Sides
    habits: dict[str, Habits] = field(default_factory=dict)

    def reversed(self) -> Layer:
        """The layer that leads from its outputs to its inputs, and is undone by the formula itself."""
        given = self.coupling
        undoing = Coupling(f"inverse of {given.name}", given.inverse, given.forward, given.determinant, ())
        return Layer(self.name, undoing, self.branches, self.sides, self.habits)

    def call(self, step: Call, numbers: Numbers, *values: Tensor, **side: Any) -> tuple[Tensor, ...]:
        """What a branch gives for stream values, as stream values."""
        called = f"{self.name}, branch {step.branch}"
        versions = [version(value) for value in values]
        branch = partial(self._given, self.branches[step.branch], numbers, side)
        given = step.execute(dict(zip(operands(step), values, strict=True)), {step.branch: branch})
        if [version(value) for value in values] != versions:
            raise StreamError(
                f"{called} changes its input in place, so the stream cannot go through it. Make its first operation an "
                "out-of-place one (for activations inplace=False)."
            )
        for result in given:
            if not isinstance(result, Tensor):
                raise StreamError(f"{called} gave a {type(result).__name__}: expected a tensor of a stream's shape.")
        return tuple(map(numbers.held, given))

    def apply(self, step: Apply, numbers: Numbers, values: Values, shapes: set[torch.Size]) -> Tensor:
        """What an operation between the branches gives."""
        try:
            return numbers.apply(step, values)
        except RuntimeError as error:
            found = ", ".join(f"{name} {tuple(values[name].shape)}" for name in names(step.operands))
            raise StreamError(
                f"{self.name}: the shapes of {found} do not fit each other; the streams came in as "
                f"{', '.join(str(tuple(s)) for s in shapes)}. Each branch must give the shape of the stream that it is "
                f"added to ({error})."
            ) from error

    @staticmethod
    def _given(branch: nn.Module, numbers: Numbers, side: dict[str, Any], *values: Tensor) -> Any:
        return branch(*(value.to(numbers.branch_dtype) for value in values), **side)


def operands(step: Call) -> tuple[str, ...]:
    """The values that a call is given, each once."""
    return tuple(dict.fromkeys(names(step.operands)))
