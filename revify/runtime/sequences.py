"""One pass through reversible blocks that were made by hand, forward or inverse, and how its blocks find it.

    x ── split ──▶ streams ── block 0 ── block 1 ── … ──▶ streams ── join ──▶ y        inverse: from y, the other way

Each block of a sequence is called as a module, so that its hooks fire, with the streams as its arguments; within its
call it finds the pass that it belongs to. Hooks and wrappers may hand on an alias of a stream (full backward hooks and
FSDP do); what is another tensor, or was changed in place, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from revify.couplings.deriving import Coupling
from revify.couplings.programs import Apply, names
from revify.errors import RevifyError, StreamError
from revify.runtime.grid import Grid, stream_dtype
from revify.runtime.layers import Layer, Sides
from revify.runtime.numbers import Numbers, common_grid
from revify.runtime.replay import version
from revify.runtime.rewinding import Rewind
from revify.runtime.tape import saves_nothing
from revify.runtime.torch_internals import is_autocast

Streams = Tensor | tuple[Tensor, ...]
Residues = list[dict[str, Tensor]]
HEADROOM = 16  # times the largest value that was seen: later inputs and weights have larger ones
FINEST = 20


class Block(Protocol):
    """A reversible block, as far as a pass needs it."""

    coupling: Coupling
    dim: int
    grid: int

    def layer(self, index: int, side: Sides) -> Layer:
        """This block as the `index`-th layer of a pass."""

    def __call__(self, *streams: Tensor, side: Sides) -> Streams:
        """The block as a module, with its hooks."""


@dataclass(slots=True)
class Passing:
    """One forward pass on its way through the blocks.

    Args:
        rewind: what records it.
        streams: where it stands.
        versions: of the streams, as the block before left them.
        index: of the block that comes next.
        expected: this block.
        side: the side inputs.
    """

    rewind: Rewind
    streams: tuple[Tensor, ...]
    versions: tuple[int, ...]
    index: int
    expected: Block | None
    side: Sides

    def through(self, given: tuple[Any, ...], side: Sides) -> tuple[Tensor, ...]:
        """Go through the block that is called just now, from within its `__call__`."""
        block, self.expected = self.expected, None
        assert block is not None  # as `passing_of` asked
        self.stand_at(self.rewind.forward(block.layer(self.index, side), self.confirmed(given)))
        return self.streams

    def stand_at(self, streams: tuple[Tensor, ...]) -> None:
        """The pass has come to these streams."""
        self.streams, self.versions = streams, tuple(map(version, streams))

    def confirmed(self, given: object) -> tuple[Tensor, ...]:
        """What hooks handed on, if it is the streams themselves, or aliases of them with the graph of the hook."""
        if not isinstance(given, tuple) or len(given) != len(self.streams) or not all(map(_alias, given, self.streams)):
            raise StreamError(
                f"block {self.index}: its input is not the output of the block before it. A hook on a block returned "
                "something else: within a ReversibleSequence hooks may look at the streams, but not replace them."
            )
        if tuple(map(version, given)) != self.versions:
            raise StreamError(
                f"block {self.index}: a hook on a block changed a stream in place, so the inputs before it could not be "
                "reconstructed. Within a ReversibleSequence hooks may look at the streams, but not change them."
            )
        return given


_passing: ContextVar[Passing | None] = ContextVar("revify_passing", default=None)


def passing_of(block: Block) -> Passing | None:
    """The pass that is calling this block just now; None where the block is called by itself."""
    passing = _passing.get()
    return passing if passing is not None and passing.expected is block else None


def forward(blocks: Sequence[Block], x: Streams, side: Sides, *, call: bool) -> tuple[Streams, Residues]:
    """Through all blocks, as one pass: the outputs, and the bits that contracting couplings keep.

    Args:
        blocks: in order.
        x: what goes into the first.
        side: more arguments of branches.
        call: whether the blocks are to be called as modules, with their hooks; not if it is the block that asks.
    """
    given = _split(x, blocks[0], swapped=False)
    device, dtype = given[0].device, given[0].dtype
    grid = common_grid((block.coupling for block in blocks), blocks[0].grid)
    branch_dtype = stream_dtype(dtype) if is_autocast(device.type) else dtype
    rewind = Rewind(Numbers(grid, branch_dtype), recorded=saves_nothing(*given))
    streams = tuple(map(rewind.numbers.held, given))
    if call:
        streams = _through(blocks, rewind, streams, side)
    else:
        for index, block in enumerate(blocks):
            streams = rewind.forward(block.layer(index, side), streams)
    return _finish(rewind, streams, blocks[0].dim if isinstance(x, Tensor) else None), rewind.residues()


def inverse(blocks: Sequence[Block], y: Streams, side: Sides, residues: Residues | None) -> Streams:
    """Backwards through all blocks, as one pass of its own, which stores no more than `forward` does."""
    couplings = [block.coupling for block in blocks]
    grid = common_grid(couplings, blocks[0].grid)
    given = _split(y, blocks[0], swapped=sum(map(_swaps, couplings)) % 2 == 1)
    rewind = Rewind(Numbers(grid, given[0].dtype), recorded=saves_nothing(*given), divides=True)
    if residues is None and any(rewind.numbers.bits(coupling) for coupling in couplings):
        raise RevifyError(
            f"{couplings[0].name} contracts: its outputs alone do not say what its inputs were. Keep the bits: "
            "y, residues = block.forward_and_residues(x), then block.inverse(y, residues=residues)."
        )
    streams = tuple(map(rewind.numbers.held, given))
    for index, block in reversed(list(enumerate(blocks))):
        layer = block.layer(index, side)
        with drawing_nothing(layer.name, given[0].device):
            streams = rewind.forward(layer.reversed(), streams, residues[index] if residues else {})
    return _finish(rewind, streams, blocks[0].dim if isinstance(y, Tensor) else None)


def fitting_resolution(blocks: Sequence[Block], x: Streams, side: Sides) -> int:
    """The finest grid with room for HEADROOM times the largest value that comes through the blocks for this input."""
    given = _split(x, blocks[0], swapped=False)
    dtype = torch.promote_types(given[0].dtype, torch.float64)
    rewind = Rewind(Numbers(None, given[0].dtype), recorded=False)
    streams = tuple(part.to(dtype) for part in given)
    largest = [part.abs().max() for part in streams if part.numel()]
    for index, block in enumerate(blocks):
        streams = rewind.forward(block.layer(index, side), streams)
        largest += [part.abs().max() for part in streams if part.numel()]
    peak = float(torch.stack([part.double() for part in largest]).max()) if largest else 1.0
    if not 0 < peak < math.inf:
        raise StreamError(
            f"the largest value that comes through these blocks is {peak}: no grid fits. Give another input."
        )
    room = math.floor(math.log2(Grid(0).limit(stream_dtype(given[0].dtype)) / (peak * HEADROOM)))
    return min(room, FINEST)


@contextmanager
def drawing_nothing(name: str, device: torch.device) -> Iterator[None]:
    """Refuse an inverse in which random numbers are drawn: they are not those of the forward pass."""
    before = _random_states(device)
    yield
    if not all(map(torch.equal, _random_states(device), before)):
        raise StreamError(
            f"{name}: a branch drew random numbers (dropout, stochastic depth) while it was inverted; they are not those "
            "that it drew in forward, so this is not its inverse. Call eval() before inverse()."
        )


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _through(blocks: Sequence[Block], rewind: Rewind, streams: tuple[Tensor, ...], side: Sides) -> tuple[Tensor, ...]:
    """Call each block, so that its hooks fire; it finds the pass that it belongs to."""
    passing = Passing(rewind, streams, tuple(map(version, streams)), 0, None, side)
    for index, block in enumerate(blocks):
        passing.index, passing.expected = index, block
        token = _passing.set(passing)
        try:
            output = block(*passing.streams, side=side)
        finally:
            _passing.reset(token)
        passing.stand_at(passing.confirmed(output))
    return passing.streams


def _finish(rewind: Rewind, streams: tuple[Tensor, ...], dim: int | None) -> Streams:
    """What the caller gets, joined along `dim` where it gave one tensor; the pass holds exact copies of it."""
    outputs = tuple(y.to(rewind.numbers.branch_dtype) for y in streams)
    joined = None
    if dim is not None:
        joined = torch.cat(outputs, dim)
        outputs = torch.split(joined, [y.shape[dim] for y in outputs], dim)
    exact_copies = outputs if outputs[0].dtype == streams[0].dtype else streams
    rewind.finish(tuple(y.detach() for y in exact_copies))
    return outputs if joined is None else joined


def _alias(given: object, stream: Tensor) -> bool:
    """Whether it is the stream, or the same values at the same place."""
    return given is stream or (
        isinstance(given, Tensor)
        and (given.data_ptr(), given.dtype, given.shape, given.stride())
        == (stream.data_ptr(), stream.dtype, stream.shape, stream.stride())
    )


def _split(x: Streams, block: Block, *, swapped: bool) -> tuple[Tensor, ...]:
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
