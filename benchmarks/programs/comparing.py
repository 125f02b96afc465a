"""What the training programs share: each is run with revify's backward and under ordinary autograd, and compared."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

import revify

Outcome = dict[str, Tensor]
Program = Callable[[], Outcome]


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of a program, run both ways.

    Args:
        program: what is trained by what.
        setting: in which way.
        compared: how many tensors: weights, running statistics, averages, losses.
        different: how many of them are not the same bits.
        trained: how many of them are not what they were before the training.
    """

    program: str
    setting: str
    compared: int
    different: int
    trained: int


def main(program: str, settings: Mapping[str, Program]) -> None:
    """Run each setting both ways; print a row of JSON for each.

    Args:
        program: its name in the table.
        settings: by name: trains a network that it makes and converts itself; gives what is to be compared. Keys that
            begin with "before " are of the untrained network.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name, train in settings.items():
        found = run(train, plain=False)
        show(compared(program, name, found, run(train, plain=True)))


def run(train: Program, *, plain: bool) -> Outcome:
    """One of the two runs, from one seed."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with revify.plain_backward() if plain else nullcontext():
        return {name: value.detach().clone() for name, value in train().items()}


def compared(program: str, setting: str, found: Outcome, expected: Outcome) -> Row:
    """The row of two outcomes."""
    after = {name for name in expected if not name.startswith("before ")}
    names = after | {name for name in found if not name.startswith("before ")}
    different = [n for n in names if n not in found or n not in expected or not same(found[n], expected[n])]
    moved = [n for n in after if f"before {n}" in expected and not same(expected[n], expected[f"before {n}"])]
    return Row(program, setting, len(names), len(different), len(moved))


def show(row: Row) -> None:
    """Print a row, as the page's program reads it."""
    print(json.dumps(asdict(row)), flush=True)


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits."""
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one.cpu(), other.cpu()))


def state(model: nn.Module, prefix: str = "") -> Outcome:
    """Copies of a network's parameters and buffers."""
    return {prefix + name: value.detach().clone() for name, value in model.state_dict().items()}


def converted(model: nn.Module, *example: Tensor, **options: object) -> nn.Module:
    """The network, converted; it must have a stage."""
    made = revify.convert(model, example, **options)
    assert made.revify_plan.stages
    return made


def batches(count: int, *shape: int, classes: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Images and labels, the same at every call."""
    numbers = torch.Generator().manual_seed(1)
    return [
        (torch.randn(shape, generator=numbers), torch.randint(classes, (shape[0],), generator=numbers))
        for _ in range(count)
    ]


@contextmanager
def group(rank: int, size: int, address: str) -> Iterator[None]:
    """Let the body be one of `size` processes that train together over gloo.

    Args:
        rank: of this process.
        size: how many there are.
        address: of a file that all of them see.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
