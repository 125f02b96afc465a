"""`Reversible` and `ReversibleSequence`: any networks as the branches of a coupling, by hand, without the converter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revify.couplings.deriving import Coupling, derive
from revify.couplings.formulas import Formula
from revify.couplings.programs import Apply, names
from revify.couplings.shipped import additive
from revify.errors import RevifyError, StreamError
from revify.runtime.grid import stream_dtype
from revify.runtime.layers import Layer, Sides, backwards
from revify.runtime.numbers import Numbers, common_grid
from revify.runtime.rewinding import Rewind
from revify.runtime.tape import saves_nothing
from revify.runtime.torch_internals import hidden_from_compiler

Streams = Tensor | tuple[Tensor, ...]
Residues = list[dict[str, Tensor]]
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
        branches: modules, in the order in which the formula names them. They keep these names as submodules.
        coupling: the formula, forward only; see `revify.couplings`.
        dim: the axis along which a tensor is split into the streams. Of an odd size the first stream gets one more.
        grid: resolution q; stream values are multiples of 2^-q.

    Raises:
        RefusalError: the formula has no inverse; the text says why.
        RevifyError: not as many branches as the formula has, or not modules.

    Reference:
        Gomez et al. 2017, "The Reversible Residual Network" (arXiv 1707.04585).
    """

    def __init__(self, *branches: nn.Module, coupling: Formula = additive, dim: int = 1, grid: int = GRID) -> None:
        super().__init__()
        self.coupling, self.dim, self.grid = derive(coupling), dim, grid
        letters = self.coupling.forward.branches
        if len(branches) != len(letters) or not all(isinstance(branch, nn.Module) for branch in branches):
            given = ", ".join(type(branch).__name__ for branch in branches) or "nothing"
            raise RevifyError(
                f"the coupling {self.coupling.name} has {len(letters)} branches ({', '.join(letters)}), got {given}: "
                "pass a torch.nn.Module for each."
            )
        for letter, branch in zip(letters, branches, strict=True):
            self.add_module(letter, branch)

    @hidden_from_compiler
    def forward(self, x: Streams, side: Sides | None = None) -> Streams:
        """The outputs of the block.

        Args:
            x: a tensor to be split, or a tuple of one tensor for each stream.
            side: more arguments for branches, by letter and keyword: `{"F": {"mask": mask}}`.

        Returns:
            As `x`: a tensor of the same size, or a tuple.
        """
        passing = _passing.get()
        if passing is not None and passing.expected is self:
            return passing.through(x, side or {})
        return _forward([self], x, side or {})[0]

    def inverse(self, y: Streams, side: Sides | None = None, residues: Residues | None = None) -> Streams:
        """The inputs of the block, from its outputs, under ordinary autograd.

        What a branch gives must depend on its arguments alone: call it in eval mode.

        Args:
            y: what the block returned.
            side: as for `forward`.
            residues: of `forward_and_residues`, for couplings that contract (`damped`).
        """
        return _inverse([self], y, side or {}, residues)

    def forward_and_residues(self, x: Streams, side: Sides | None = None) -> tuple[Streams, Residues]:
        """As `forward`, with the bits that an exact inverse needs where a coupling contracts."""
        return _forward([self], x, side or {})

    def layer(self, index: int, side: Sides) -> Layer:
        """This block as the runtime's layer."""
        branches = {letter: self.get_submodule(letter) for letter in self.coupling.forward.branches}
        unknown = side.keys() - branches.keys()
        if unknown:
            raise RevifyError(
                f"side inputs for {', '.join(sorted(unknown))}: the branches are {', '.join(branches)}. Give them by "
                'letter and keyword: side={"F": {"mask": mask}}.'
            )
        return Layer(f"block {index} ({self.coupling.name})", self.coupling, branches, side)


class ReversibleSequence(nn.Module):
    """`Reversible` blocks one after the other, which hold the outputs of the last one only, whatever the depth.

    Couplings may differ from block to block; if one of them needs floats, all run in floats. Hooks on the blocks fire
    once, with a tuple of streams. Indexing, `len` and iteration give the blocks.

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
    def forward(self, x: Streams, side: Sides | None = None) -> Streams:
        """The outputs of the last block; arguments as for `Reversible.forward`, with `side` for every block."""
        return _forward(list(self), x, side or {})[0]

    def inverse(self, y: Streams, side: Sides | None = None, residues: Residues | None = None) -> Streams:
        """The inputs of the first block from the outputs of the last; as `Reversible.inverse`."""
        return _inverse(list(self), y, side or {}, residues)

    def forward_and_residues(self, x: Streams, side: Sides | None = None) -> tuple[Streams, Residues]:
        """As `forward`, with the bits that an exact inverse needs where a coupling contracts."""
        return _forward(list(self), x, side or {})

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self.blocks[index]

    def __iter__(self) -> Iterator[Any]:  # Any: they are Reversible, which ModuleList does not know
        return iter(self.blocks)


@dataclass(slots=True)
class Passing:
    """One forward pass on its way through the blocks.

    Args:
        rewind: what records it.
        streams: where it stands.
        index: of the block that comes next.
        expected: this block.
        side: the side inputs.
    """

    rewind: Rewind
    streams: tuple[Tensor, ...]
    index: int
    expected: Reversible | None
    side: Sides

    def through(self, x: Streams, side: Sides) -> tuple[Tensor, ...]:
        """Go through the block that is called just now, from within its `__call__`."""
        self._confirm(x)
        block, self.expected = self.expected, None
        assert block is not None  # as the caller asked
        self.streams = self.rewind.forward(block.layer(self.index, side), self.streams)
        return self.streams

    def _confirm(self, x: object) -> None:
        if not isinstance(x, tuple) or any(a is not b for a, b in zip(x, self.streams, strict=False)):
            raise StreamError(
                f"block {self.index}: its input is not the output of the block before it. A hook on a block returned "
                "something else: within a ReversibleSequence hooks may look at the streams, but not replace them."
            )


_passing: ContextVar[Passing | None] = ContextVar("revify_passing", default=None)


def _forward(blocks: list[Reversible], x: Streams, side: Sides) -> tuple[Streams, Residues]:
    """Through all blocks, as one pass."""
    first = blocks[0]
    given = _split(x, first, swapped=False)
    device, dtype = given[0].device, given[0].dtype
    grid = common_grid((block.coupling for block in blocks), first.grid)
    branch_dtype = stream_dtype(dtype) if torch.is_autocast_enabled(device.type) else dtype
    numbers = Numbers(grid, branch_dtype)
    rewind = Rewind(numbers, recorded=saves_nothing())
    passing = Passing(rewind, tuple(map(numbers.held, given)), 0, None, side)
    if len(blocks) == 1:
        passing.streams = rewind.forward(first.layer(0, side), passing.streams)
    else:
        _through(blocks, passing)
    outputs = tuple(y.to(branch_dtype) for y in passing.streams)
    if isinstance(x, Tensor):
        joined = torch.cat(outputs, first.dim)
        outputs = torch.split(joined, [y.shape[first.dim] for y in outputs], first.dim)
    exact_copies = outputs if outputs[0].dtype == passing.streams[0].dtype else passing.streams
    rewind.finish(tuple(y.detach() for y in exact_copies))
    return joined if isinstance(x, Tensor) else outputs, rewind.residues()


def _through(blocks: list[Reversible], passing: Passing) -> None:
    """Call each block, so that its hooks fire; it finds the pass that it belongs to."""
    for index, block in enumerate(blocks):
        passing.index, passing.expected = index, block
        token = _passing.set(passing)
        try:
            output = block(passing.streams, passing.side)
        finally:
            _passing.reset(token)
        passing._confirm(output)


def _inverse(blocks: list[Reversible], y: Streams, side: Sides, residues: Residues | None) -> Streams:
    """Backwards through all blocks."""
    couplings = [block.coupling for block in blocks]
    grid = common_grid(couplings, blocks[0].grid)
    given = _split(y, blocks[0], swapped=sum(map(_swaps, couplings)) % 2 == 1)
    numbers = Numbers(grid, given[0].dtype)
    if residues is None and any(numbers.bits(coupling) for coupling in couplings):
        raise RevifyError(
            f"{couplings[0].name} contracts: its outputs alone do not say what its inputs were. Keep the bits: "
            "y, residues = block.forward_and_residues(x), then block.inverse(y, residues=residues)."
        )
    streams = tuple(map(numbers.held, given))
    for index, block in reversed(list(enumerate(blocks))):
        streams = backwards(block.layer(index, side), numbers, streams, residues[index] if residues else {})
    outputs = tuple(x.to(given[0].dtype) for x in streams)
    return torch.cat(outputs, blocks[0].dim) if isinstance(y, Tensor) else outputs


def _split(x: Streams, block: Reversible, *, swapped: bool) -> tuple[Tensor, ...]:
    """The streams of an input; `swapped` says that the larger one is the last."""
    count = len(block.coupling.forward.inputs)
    if isinstance(x, Tensor):
        if not -x.dim() <= block.dim < x.dim() or x.shape[block.dim] < count:
            raise StreamError(
                f"a tensor of shape {tuple(x.shape)} cannot be split into {count} streams along dim={block.dim}: give "
                "the axis of the channels, Reversible(…, dim=1) for NCHW or dim=-1 for tokens."
            )
        sizes = [part.numel() for part in torch.tensor_split(torch.empty(x.shape[block.dim], device="meta"), count)]
        return torch.split(x, sizes[::-1] if swapped else sizes, block.dim)
    tensors = isinstance(x, tuple) and all(isinstance(part, Tensor) for part in x)
    if not tensors or len(x) != count:
        raise StreamError(
            f"expected a tensor or a tuple of {count} tensors, one for each stream of {block.coupling.name}; got "
            f"{type(x).__name__}" + (f" of {len(x)}." if isinstance(x, tuple) else ".")
        )
    return x


def _swaps(coupling: Coupling) -> bool:
    """Whether the first of the outputs has the shape of the last of the inputs: operations keep shapes."""
    program = coupling.forward
    alike = {program.inputs[-1]}
    for _ in program.instructions:  # as often as it can take to spread through all of them
        for step in program.instructions:
            together = {step.result, *names(step.operands)} if isinstance(step, Apply) else set()
            if together & alike:
                alike |= together
    return program.outputs[0] in alike and program.inputs[0] not in alike
