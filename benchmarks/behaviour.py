"""What a converted network does in the situations in which reversible libraries were found wrong → docs/behaviour.md.

    python benchmarks/behaviour.py

Each cell is a run in float32 and one under autocast to bfloat16: the memory-free backward is compared, bit for bit, with
ordinary autograd on the same network. The rows are those of a comparison of libraries; each names a test that holds it.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import revify

PAGE = Path(__file__).parent.parent / "docs" / "behaviour.md"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROCESSES = 2


class Branch(nn.Module):
    """A branch with BatchNorm, an extra argument and dropout, [n, c, h, w] → [n, d, h, w]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.mix, self.drop = nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, padding=1), nn.Dropout(0.2)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.mix(self.norm(x))) * gain)


class Block(nn.Module):
    """Two branches one after the other, each added to what is there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Branch(width, width), Branch(width, width)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        x = x + self.one(x, gain)
        return x + self.two(x, gain)


class Net(nn.Module):
    """A stem, blocks in a row, each given a learned factor as well, and a head."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks, self.head = nn.ModuleList(Block(width) for _ in range(depth)), nn.Linear(width, 4)
        self.gain = nn.Parameter(torch.tensor([0.1]))

    def forward(self, x: Tensor) -> Tensor:
        x, gain = self.stem(x), self.gain.exp()
        for block in self.blocks:
            x = block(x, gain)
        return self.head(x.mean((2, 3)))


class ByHand(Net):
    """The same with a sequence of reversible blocks between the halves of the channels."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__(0, width)
        more, less = width - width // 2, width // 2
        pairs = [revify.Reversible(Branch(less, more), Branch(more, less), dim=1) for _ in range(depth)]
        self.blocks = revify.ReversibleSequence(pairs)

    def forward(self, x: Tensor) -> Tensor:
        gain = {"gain": self.gain.exp()}
        return self.head(self.blocks(self.stem(x), side={"F": gain, "G": gain}).mean((2, 3)))


def images(width: int = 4) -> Tensor:
    return torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(1))


KEEP = {"transitions": "keep"}
FORMS: dict[str, dict[str, str] | None] = {
    "coded blocks": KEEP,
    "coded branches": {**KEEP, "unit": "branch"},
    "recurrence": {**KEEP, "step": "recurrence"},
    "split": {**KEEP, "streams": "split"},
    "by hand": None,
    "checkpoints outside, too": {"transitions": "checkpoint"},
}


@cache
def made(form: str, depth: int, width: int) -> nn.Module:
    """A network of one form, always the same; made by hand where there are no options."""
    torch.manual_seed(0)
    options = FORMS[form]
    if options is None:
        return ByHand(depth, width).train()
    return revify.convert(Net(depth, width), images(), **options).train()


@dataclass(frozen=True)
class Case:
    """One cell in one precision.

    Args:
        form: of the network.
        dtype: of autocast; float32 for none.
    """

    form: str
    dtype: torch.dtype

    def make(self, depth: int = 4, width: int = 6) -> nn.Module:
        return copy.deepcopy(made(self.form, depth, width))

    def loss(self, model: nn.Module, x: Tensor | None = None) -> Tensor:
        """Autocast ends before the backward begins."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
            return model(images() if x is None else x).float().square().sum()


Steps = Callable[[Case, nn.Module], Iterable[Tensor | None] | None]


def same(steps: Steps, case: Case, wrap: Callable[[nn.Module], nn.Module] = lambda m: m, **size: int) -> str:
    """Whether gradients, results and buffers after `steps` are the same in both backwards, and not all nothing."""
    found = []
    for ordinary in (True, False):
        model = wrap(case.make(**size))
        torch.manual_seed(3)
        with revify.plain_backward() if ordinary else nullcontext():
            results = steps(case, model)
        found.append([*(results or ()), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())])
    pairs = list(zip(*found, strict=True))
    alike = all(a is b or (a is not None and b is not None and torch.equal(local(a), local(b))) for a, b in pairs)
    return "equal" if alike and any(a is not None and local(a).any() for a, _ in pairs) else "**different**"


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def step(case: Case, model: nn.Module) -> None:
    case.loss(model).backward()


def two_forwards(case: Case, model: nn.Module) -> None:
    one, two = case.loss(model), case.loss(model, images().flip(0))
    one.backward()
    two.backward()


def retained(case: Case, model: nn.Module) -> None:
    value = case.loss(model)
    value.backward(retain_graph=True)
    value.backward()


def given_gradient(case: Case, model: nn.Module) -> list[Tensor | None]:
    x = images().requires_grad_()
    case.loss(model, x).backward()
    return [x.grad]


def reused(case: Case, model: nn.Module) -> list[Tensor | None]:
    x = images().requires_grad_()
    y = x * 2
    (case.loss(model, y) + y.square().sum()).backward()
    return [x.grad]


def evaluated(case: Case, model: nn.Module) -> None:
    step(case, model.eval())


def asked(case: Case, model: nn.Module) -> list[Tensor | None]:
    given = list(torch.autograd.grad(case.loss(model), list(model.parameters()), allow_unused=True))
    assert all(p.grad is None for p in model.parameters())
    return given


def twice(case: Case, model: nn.Module) -> None:
    x = images().requires_grad_()
    (slope,) = torch.autograd.grad(case.loss(model, x), x, create_graph=True)
    slope.square().sum().backward()


def without(case: Case, model: nn.Module) -> list[Tensor]:
    x = images()
    with torch.no_grad():
        values = [case.loss(model.eval(), x), case.loss(model, x), x]
    assert torch.equal(values[0], values[1])
    assert torch.equal(x, images())
    return values


def several(case: Case, model: nn.Module) -> None:
    for _ in range(2):
        step(case, model)


def drawn(case: Case) -> str:
    found = []
    for seed in (5, 5, 6):
        model = case.make()
        torch.manual_seed(seed)
        step(case, model)
        found.append(model.gain.grad)
    return "yes" if torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2]) else "**no**"


def updates(case: Case) -> str:
    model = case.make()
    step(case, model)
    return ", ".join(str(n) for n in {int(b) for name, b in model.named_buffers() if name.endswith("tracked")})


def fired(case: Case) -> str:
    model, times = case.make(), {}
    norm = next(part for name, part in model.named_modules() if name.startswith("blocks") and name.endswith("norm"))
    for name, part in {"block": list(model.blocks)[1], "norm": norm}.items():
        times[name] = 0
        part.register_forward_hook(lambda *_, name=name: times.update({name: times[name] + 1}))
    step(case, model)
    return ", ".join(str(n) for n in set(times.values()))


def names(case: Case) -> str:
    if FORMS[case.form] is None:
        return "–"
    return "yes" if case.make().state_dict().keys() == Net(4, 6).state_dict().keys() else "**no**"


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


def sharded(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for part in model.blocks:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


Cell = Callable[[Case], str]
ROWS: dict[str, tuple[Cell, str]] = {
    "gradients, with dropout": (partial(same, step), "runtime/test_coded.py::test_zoo"),
    "gradients at depth 64": (partial(same, step, depth=64), "runtime/test_runtime.py::test_sixty_four_blocks"),
    "the seed reproduces the run": (
        drawn,
        "runtime/test_runtime.py::test_the_seed_reproduces_the_run_and_another_seed_does_not",
    ),
    "two forwards, then both backwards": (
        partial(same, two_forwards),
        "runtime/test_coded.py::test_two_forwards_before_backward",
    ),
    "BatchNorm updates in a step": (updates, "runtime/test_runtime.py::test_batch_norm_counts_once"),
    "the input has a gradient": (partial(same, given_gradient), "runtime/test_runtime.py::test_input_without_gradient"),
    "the input is used by something else": (
        partial(same, reused),
        "runtime/test_runtime.py::test_input_of_the_stage_is_used_by_something_else_and_stays_as_it_was",
    ),
    "autograd.grad of the parameters": (
        partial(same, asked),
        "runtime/test_runtime.py::test_autograd_grad_leaves_grad_alone",
    ),
    "second backward with retain_graph": (
        partial(same, retained),
        "runtime/test_runtime.py::test_second_backward_with_retain_graph",
    ),
    "double backward": (partial(same, twice), "runtime/test_runtime.py::test_double_backward"),
    "under no_grad": (partial(same, without), "runtime/test_runtime.py::test_without_gradients"),
    "eval mode and backward": (partial(same, evaluated), "runtime/test_runtime.py::test_eval_mode"),
    "odd number of channels": (
        partial(same, step, width=7),
        "planning/test_halving.py::test_odd_channels_are_split_unequally",
    ),
    "a forward hook fires, on a block and within one": (
        fired,
        "runtime/test_hooks.py::test_hooks_that_look_on_see_what_they_see_in_ordinary_autograd",
    ),
    "state_dict keys are the plain model's": (names, "test_conversion.py::test_same_class_paths_and_state"),
    "torch.compile of the model": (
        partial(same, several, wrap=compiled),
        "runtime/test_parallel.py::test_compiled_whole",
    ),
}
DDP = "runtime/test_parallel.py::test_ddp"
TOGETHER: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DDP": (DistributedDataParallel, DDP),
    "DDP, find_unused_parameters": (partial(DistributedDataParallel, find_unused_parameters=True), DDP),
    "DDP, static_graph": (partial(DistributedDataParallel, static_graph=True), DDP),
    "FSDP2, each block and the model": (sharded, "runtime/test_parallel.py::test_fsdp_of_each_block"),
}


def cells(cell: Cell) -> list[str]:
    """One for each form; where the precisions differ, both."""
    texts = []
    for form in FORMS:
        found = {name: told(cell, Case(form, dtype)) for name, dtype in PRECISIONS.items()}
        texts.append(
            ", ".join(f"{name} {text}" for name, text in found.items()) if len({*found.values()}) > 1 else found["fp32"]
        )
    return texts


def told(cell: Cell, case: Case) -> str:
    try:
        return cell(case)
    except revify.RevifyError as error:
        return type(error).__name__


def process(rank: int, folder: str) -> None:
    """One of several processes that train together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", PROCESSES), rank=rank, world_size=PROCESSES)
    rows = {name: cells(partial(same, several, wrap=wrap)) for name, (wrap, _) in TOGETHER.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def together() -> dict[str, list[str]]:
    """The rows of several processes, which must agree."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (folder,), PROCESSES)
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]
    assert found[0] == found[1]
    return found[0]


def main() -> None:
    """Run every cell and write the page."""
    torch.set_num_threads(1)
    lines = [
        "# Behaviour",
        "",
        f"Written by `python benchmarks/behaviour.py` with torch {torch.__version__.split('+')[0]}. Each cell is a run in",
        "float32 and one under autocast to bfloat16, in forward only, of a small network whose blocks have dropout, BatchNorm",
        'and an extra argument with a gradient. "equal" means that gradients and buffers are those of ordinary autograd on the',
        f"same network, bit for bit. DDP and FSDP2 run in {PROCESSES} processes (gloo), two steps; torch.compile has the",
        "backend aot_eager.",
        "",
        f"| | {' | '.join(FORMS)} | a test of it |",
        f"|{'---|' * (len(FORMS) + 2)}",
    ]
    rows = {name: (cells(cell), test) for name, (cell, test) in ROWS.items()}
    rows |= {name: (texts, TOGETHER[name][1]) for name, texts in together().items()}
    for name, (texts, test) in rows.items():
        lines.append(f"| {name} | {' | '.join(texts)} | `{test}` |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
