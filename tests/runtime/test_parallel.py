"""Converted models inside of PyTorch's own wrappers: DDP, FSDP2, torch.compile, activation checkpointing."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from asserts import assert_same, converted, gradients, inputs_of, run
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import revify

every_step = pytest.mark.parametrize(
    "options", [{"step": "coded"}, {"bits": 1}, {"streams": "split"}], ids=["coded", "full", "split"]
)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_step
@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.parametrize("kind", [zoo.DropoutAndDropPath, zoo.PostActivationBatchNorm, zoo.FrozenStart])
def test_ddp(one_process: None, kind: type[zoo.Net], settings: dict[str, bool], options: dict[str, Any]) -> None:
    model = converted(kind, **options)
    x = inputs_of(model)
    expected = run(copy.deepcopy(model), x, plain=True)
    wrapped = DistributedDataParallel(model, **settings)
    for _ in range(3):  # static_graph behaves otherwise from the second step on
        found = run(wrapped, x)
        assert_same({n.replace("module.", ""): t for n, t in found.items()}, expected)


@every_step
@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("kind", [zoo.PreNormBlocks, zoo.TwoAdditionsInABlock, zoo.FrozenMiddle])
def test_fsdp_of_each_block(one_process: None, kind: type[zoo.Net], root: bool, options: dict[str, Any]) -> None:
    model = converted(kind, **options)
    x = inputs_of(model)
    expected = run(copy.deepcopy(model), x, plain=True)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    if root:
        fully_shard(model, mesh=mesh)
    for _ in range(2):
        found = run(model, x)
        local = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in found.items()}
        assert_same(local, expected)


@every_step
def test_fsdp_in_mixed_precision(one_process: None, options: dict[str, Any]) -> None:
    model = converted(zoo.PreNormBlocks, **options)
    x = inputs_of(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.blocks:
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (1,)), mp_policy=policy)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)), mp_policy=policy)
    local = []
    for plain in (True, False):
        outcome = run(model, x, plain=plain)
        local.append({n: t.to_local() if hasattr(t, "to_local") else t for n, t in outcome.items()})
    assert_same(local[1], local[0])


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "fsdp of the blocks only"])
def test_wrapped_models_are_refused(one_process: None, wrap: str) -> None:
    model = zoo.PreNormBlocks()
    x = model.example()
    if wrap == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        for part in model.blocks if "blocks" in wrap else [model]:
            fully_shard(part, mesh=dist.init_device_mesh("cpu", (1,)))
        wrapped = model
    for function in (revify.plan, revify.convert):
        with pytest.raises(
            revify.RefusalError, match=r"wrapped for parallel training .* Convert the plain model first"
        ):
            function(wrapped, x)


TWO_PROCESSES = """
import os, sys, torch, torch.distributed as dist
sys.path[:0] = {path!r}
import zoo
from asserts import converted, gradients
import revify
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
model = converted(zoo.DropoutAndDropPath, bits=1)
wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
torch.manual_seed(rank)
x = torch.randn(model.SHAPE)
found = []
for plain in (True, False):
    model.zero_grad()
    torch.manual_seed(10 + rank)
    with revify.plain_backward() if plain else torch.enable_grad():
        wrapped(x).square().sum().backward()
    found.append(gradients(model))
assert any(g.any() for g in found[0].values())
assert all(torch.equal(found[0][n], found[1][n]) for n in found[0]), "the backwards differ"
together = [None, None]
dist.all_gather_object(together, found[1])
assert all(torch.equal(together[0][n], together[1][n]) for n in together[0]), "the processes differ"
print("equal")
"""


@pytest.mark.slow
def test_ddp_with_two_processes(tmp_path: Path) -> None:
    here = Path(zoo.__file__).parent
    script = TWO_PROCESSES.format(path=[str(here), str(here.parent)])
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
        assert out.decode().strip() == "equal"


@every_step
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_modules_inside_of_blocks(backend: str, options: dict[str, Any]) -> None:
    model = converted(zoo.TwoAdditionsInABlock, **options).eval()  # eager and compiled draw other numbers in dropout
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.mlp.compile(backend=backend)
    x = inputs_of(model)
    torch.testing.assert_close(run(compiled, x), run(model, x, plain=True), rtol=1e-4, atol=1e-5)
    assert_same(run(compiled, x), run(compiled, x, plain=True))


@every_step
def test_compiled_whole(options: dict[str, Any]) -> None:
    """The steps are hidden from the compiler; what lies around them is compiled."""
    model = converted(zoo.DropoutAndDropPath, **options)
    x = inputs_of(model)
    expected = run(model, x, plain=True)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    found = run(compiled, x)
    assert_same({n.replace("_orig_mod.", ""): t for n, t in found.items()}, expected)


@pytest.mark.parametrize("compile_part", [lambda m: torch.compile(m), lambda m: m.blocks[0].compile() or m])
def test_compiled_models_are_refused(compile_part: object) -> None:
    model = zoo.PreNormBlocks()
    compiled = compile_part(model)
    with pytest.raises(revify.RefusalError, match=r"compiled with torch.compile.* Convert the plain model first"):
        revify.convert(compiled, model.example())


@every_step
def test_checkpointing_around_a_converted_model(options: dict[str, Any]) -> None:
    """The outer checkpoint sees the whole stage run again, so it is of no use, but it does no harm."""
    model = converted(zoo.DropoutAndDropPath, **options)
    x = inputs_of(model)
    expected = run(model, x, plain=True)
    model.zero_grad()
    torch.manual_seed(1)
    output = torch.utils.checkpoint.checkpoint(model, *x, use_reentrant=False)
    (output * torch.linspace(-1, 2, output.numel()).view(output.shape)).sum().backward()
    assert_same(gradients(model), {n: t for n, t in expected.items() if n.startswith("grad")})


def test_checkpointing_inside_of_blocks() -> None:
    class Block(zoo.Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.out(self.norm(x))
            if self.training:
                return x + torch.utils.checkpoint.checkpoint(self.mlp, y, use_reentrant=False)
            return x + self.mlp(y)

    model = converted(lambda: zoo.Net(*(Block() for _ in range(4))), bits=1)
    x = inputs_of(model)
    assert_same(run(model, x), run(model, x, plain=True))
