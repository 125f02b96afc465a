"""`Reversible` and `ReversibleSequence`: any networks as the branches of a coupling, by hand, without the converter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from revify.couplings.deriving import derive
from revify.couplings.formulas import Formula
from revify.couplings.shipped import additive
from revify.errors import RevifyError
from revify.runtime.layers import Layer, Sides
from revify.runtime.sequences import Residues, Streams, fitting_resolution, forward, inverse, passing_of
from revify.runtime.states import Habits
from revify.runtime.torch_internals import hidden_from_compiler

GRID = 12


class Reversible(nn.Module):
    """A block made of any networks, whose inputs follow from its outputs, so that none of its activations is stored.

    Couplings of sums (`additive`, `swapped`, `single`, `half`, `damped`) run on a grid, like converted models: the
    gradients are those of ordinary autograd on this block (`with revify.plain_backward():`), bit for bit, and stream
    values must stay within ±2^(24-grid). Other couplings (`affine`) run in floats: what is reconstructed drifts, which
    is measured in every backward, and refused beyond 1e-3. For several blocks use `ReversibleSequence`: it holds the
    outputs of its last block only, while blocks one after the other each hold theirs.

    Example:
        >>> import torch, revify
        >>> F, G = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in "FG")
        >>> block = revify.Reversible(F, G, dim=-1)
        >>> x = torch.randn(2, 3, 8)
        >>> y = block(x)
        >>> bool((block.inverse(y) - x).abs().max() < 1e-3)
        True

    Args:
        branches: modules, in the order in which the formula names them. They keep these names as submodules. Given the
            first only, the others are copies of it, with parameters of their own.
        coupling: the formula, forward only; see `revify.couplings`.
        dim: the axis along which a tensor is split into the streams. Of an odd size the first stream gets one more.
        grid: resolution q; stream values are multiples of 2^-q. Beyond q = 20 they are held in float64: grid=32 is as near to
            the formula in float32 as float32 itself, within ±2^21, for twice the memory of the streams. `fit_grid`
            chooses it from an input.

    Raises:
        RefusalError: the formula has no inverse; the text says why.
        RevifyError: not as many branches as the formula has, or not modules.

    Reference:
        Gomez et al. 2017, "The Reversible Residual Network" (arXiv 1707.04585).
    """

    def __init__(self, *branches: nn.Module, coupling: Formula = additive, dim: int = 1, grid: int = GRID) -> None:
        super().__init__()
        self.coupling, self.dim, self.grid = derive(coupling), dim, grid
        self._habits: dict[str, Habits] = {}
        gives = self.coupling.forward.gives
        letters = tuple(gives)
        if len(branches) == 1 and isinstance(branches[0], nn.Module) and len(set(gives.values())) == 1:
            branches = (*branches, *(copy.deepcopy(branches[0]) for _ in letters[1:]))
        if len(branches) != len(letters) or not all(isinstance(branch, nn.Module) for branch in branches):
            given = ", ".join(type(branch).__name__ for branch in branches) or "nothing"
            raise RevifyError(
                f"the coupling {self.coupling.name} has {len(letters)} branches ({', '.join(letters)}), got {given}: "
                "pass a torch.nn.Module for each, or one of which the others are copies."
            )
        for letter, branch in zip(letters, branches, strict=True):
            self.add_module(letter, branch)

    @hidden_from_compiler
    def forward(self, x: Streams, *more: Tensor | Sides, side: Sides | None = None) -> Streams:
        """The outputs of the block.

        Args:
            x: a tensor to be split, or a tuple of one tensor for each stream.
            more: the other streams, where x is the first one: `block(x1, x2)`.
            side: more arguments for branches, by letter and keyword: `{"F": {"mask": mask}}`.

        Returns:
            A tensor of the same size for a tensor, else a tuple.
        """
        streams, side = _arguments(x, more, side)
        passing = passing_of(self)
        if passing is not None:
            return passing.through(streams if isinstance(streams, tuple) else (streams,), side)
        return forward([self], streams, side, call=False)[0]

    @hidden_from_compiler
    def inverse(
        self, y: Streams, *more: Tensor | Sides, side: Sides | None = None, residues: Residues | None = None
    ) -> Streams:
        """The inputs of the block, from its outputs; it stores no activations either.

        Args:
            y: what the block returned.
            more: the other streams, where y is the first one.
            side: as for `forward`.
            residues: of `forward_and_residues`, for couplings that contract (`damped`).

        Raises:
            StreamError: a branch drew random numbers, which are not those of the forward pass: call it in eval mode.
        """
        streams, side = _arguments(y, more, side)
        return inverse([self], streams, side, residues)

    def forward_and_residues(self, x: Streams, side: Sides | None = None) -> tuple[Streams, Residues]:
        """As `forward`, with the bits that an exact inverse needs where a coupling contracts."""
        return forward([self], x, side or {}, call=False)

    @torch.no_grad()
    def fit_grid(self, x: Streams, *more: Tensor | Sides, side: Sides | None = None) -> int:
        """Choose the grid from what flows: the finest with room for 16 times the largest value that this input leads to.

        Runs a copy on the input once; parameters, buffers and random numbers stay as they are. Without it the grid is
        as given, 2^-12 at first.

        Returns:
            The resolution q that the block now has.
        """
        streams, side = _arguments(x, more, side)
        resolution = _fitting([self], streams, side)
        self.grid = resolution
        return resolution

    def layer(self, index: int, side: Sides) -> Layer:
        """This block as the runtime's layer."""
        branches = {letter: self.get_submodule(letter) for letter in self.coupling.forward.branches}
        unknown = side.keys() - branches.keys()
        if unknown:
            raise RevifyError(
                f"side inputs for {', '.join(sorted(unknown))}: the branches are {', '.join(branches)}. Give them by "
                'letter and keyword: side={"F": {"mask": mask}}.'
            )
        return Layer(f"block {index} ({self.coupling.name})", self.coupling, branches, side, self._habits)


class ReversibleSequence(nn.Module):
    """`Reversible` blocks one after the other, which hold the outputs of the last one only, whatever the depth.

    Couplings may differ from block to block; if one of them needs floats, all run in floats. Hooks on the blocks fire
    once; a block is called with its streams, and returns a tuple of them. Indexing, `len` and iteration give the blocks.

    Example:
        >>> import torch, revify
        >>> blocks = [revify.Reversible(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), dim=-1) for _ in range(6)]
        >>> net = revify.ReversibleSequence(blocks)
        >>> net(torch.randn(2, 3, 8)).sum().backward()

    Args:
        blocks: with the same `dim`, `grid` and number of streams.

    Raises:
        RevifyError: there are no blocks, or they differ in one of these.
    """

    def __init__(self, blocks: Iterable[Reversible]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        alike = {(b.dim, b.grid, len(b.coupling.forward.inputs)) for b in self.blocks if isinstance(b, Reversible)}
        if len(alike) != 1 or not all(isinstance(b, Reversible) for b in self.blocks):
            raise RevifyError(
                "ReversibleSequence: expected at least one block, all of them revify.Reversible with the same dim, "
                f"grid and number of streams; got {', '.join(type(b).__name__ for b in self.blocks) or 'none'} with "
                f"{len(alike)} different settings."
            )

    @hidden_from_compiler
    def forward(self, x: Streams, *more: Tensor | Sides, side: Sides | None = None) -> Streams:
        """The outputs of the last block; arguments as for `Reversible.forward`, with `side` for every block."""
        streams, side = _arguments(x, more, side)
        return forward(list(self), streams, side, call=True)[0]

    @hidden_from_compiler
    def inverse(
        self, y: Streams, *more: Tensor | Sides, side: Sides | None = None, residues: Residues | None = None
    ) -> Streams:
        """The inputs of the first block from the outputs of the last; as `Reversible.inverse`."""
        streams, side = _arguments(y, more, side)
        return inverse(list(self), streams, side, residues)

    def forward_and_residues(self, x: Streams, side: Sides | None = None) -> tuple[Streams, Residues]:
        """As `forward`, with the bits that an exact inverse needs where a coupling contracts."""
        return forward(list(self), x, side or {}, call=True)

    @torch.no_grad()
    def fit_grid(self, x: Streams, *more: Tensor | Sides, side: Sides | None = None) -> int:
        """Choose the grid from what flows: the finest with room for 16 times the largest value that this input leads to.

        Runs a copy on the input once; parameters, buffers and random numbers stay as they are. Without it the grid is
        as given, 2^-12 at first.

        Returns:
            The resolution q that all blocks now have.
        """
        streams, side = _arguments(x, more, side)
        resolution = _fitting(list(self), streams, side)
        for block in self:
            block.grid = resolution
        return resolution

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self.blocks[index]

    def __iter__(self) -> Iterator[Any]:  # Any: they are Reversible, which ModuleList does not know
        return iter(self.blocks)


def _fitting(blocks: list[Reversible], streams: Streams, side: Sides) -> int:
    """The resolution for blocks, found on copies of them."""
    first = streams if isinstance(streams, Tensor) else streams[0]
    devices = [first.device] if first.device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices, device_type=first.device.type if devices else "cuda"):
        return fitting_resolution(copy.deepcopy(blocks), streams, side)


def _arguments(x: Streams, more: tuple[Tensor | Sides, ...], side: Sides | None) -> tuple[Streams, Sides]:
    """The streams, given as one tensor, as a tuple, or one by one; and the side inputs, which may come after them."""
    if more and isinstance(more[-1], Mapping) and side is None:
        side, more = more[-1], more[:-1]
    streams: Any = (x, *more) if more else x  # Any: what are no tensors is refused where they are split
    return streams, side or {}
