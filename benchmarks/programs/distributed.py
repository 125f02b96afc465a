"""Two processes over gloo: DDP (accumulation under `no_sync`, unused parameters, static graph) and FSDP2.

python benchmarks/programs/distributed.py
"""

from __future__ import annotations

import tempfile
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparing import Outcome, batches, compared, converted, group, run, show, state
from timm import create_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

PROCESSES = 2
PROGRAM = "two processes"


class TwoHeads(nn.Module):
    """A network of which one head is not used in every step."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.unused = network, nn.Linear(5, 5)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.network(x) if self.calls % 2 else self.unused(self.network(x))


def network() -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    made = create_model("test_vit", num_classes=5, depth=4, drop_path_rate=0.1)
    return converted(made, torch.zeros(2, 3, 160, 160))


def with_ddp(rank: int, *, accumulate: int = 1, heads: bool = False, amp: bool = False, **options: Any) -> Outcome:
    """Four steps of one process."""
    model = TwoHeads(network()) if heads else network()
    before = state(model, "before ")
    wrapped = DistributedDataParallel(model, **options)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    for number, (images, labels) in enumerate(batches(4, 4, 3, 160, 160)):
        needed = (number + 1) % accumulate == 0
        with nullcontext() if needed else wrapped.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = nn.functional.cross_entropy(wrapped(images[rank::PROCESSES]), labels[rank::PROCESSES])
            loss.backward()
        if needed:
            optimizer.step()
            optimizer.zero_grad()
    return before | state(model)


def with_fsdp(rank: int, *, policy: MixedPrecisionPolicy | None = None, reshard: bool = True) -> Outcome:
    """Four steps of one process, with each block and the rest as shards."""
    model = network()
    before = state(model, "before ")
    options: dict[str, Any] = {"mp_policy": policy} if policy else {}
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    for images, labels in batches(4, 4, 3, 160, 160):
        nn.functional.cross_entropy(model(images[rank::PROCESSES]).float(), labels[rank::PROCESSES]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before | {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in state(model).items()}


SETTINGS: dict[str, Any] = {
    "DDP": with_ddp,
    "DDP, bf16, accumulation under no_sync": partial(with_ddp, accumulate=2, amp=True),
    "DDP, a head that is not always used": partial(with_ddp, heads=True, find_unused_parameters=True),
    "DDP, static graph": partial(with_ddp, static_graph=True),
    "FSDP2": with_fsdp,
    "FSDP2, whole after forward": partial(with_fsdp, reshard=False),
    "FSDP2, bf16": partial(with_fsdp, policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
}


def work(rank: int, folder: str) -> None:
    """What each process does; the first prints."""
    warnings.filterwarnings("ignore")
    for number, (name, train) in enumerate(SETTINGS.items()):
        outcomes = []
        for plain in (False, True):
            with group(rank, PROCESSES, str(Path(folder, f"{number}{plain}"))):
                outcomes.append(run(partial(train, rank), plain=plain))
        if rank == 0:
            show(compared(PROGRAM, name, *outcomes))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as shared:
        torch.multiprocessing.spawn(work, (shared,), PROCESSES)
