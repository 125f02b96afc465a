"""What a converted network does in the situations in which reversible libraries were found wrong → docs/behaviour.md.

    python benchmarks/behaviour.py

Each cell is a run: the memory-free backward is compared, bit for bit, with ordinary autograd on the same network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import revify

PAGE = Path(__file__).parent.parent / "docs" / "behaviour.md"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Branch(nn.Module):
    """A branch with dropout and BatchNorm, [n, c, h, w] → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix, self.drop = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.mix(self.norm(x))))


class Block(nn.Module):
    """x + branch(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = Branch(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    """A stem, blocks in a row, a head."""

    def __init__(self, blocks: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks, self.head = blocks, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Halves(nn.Module):
    """A sequence by hand between the halves of the channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.sequence = revify.ReversibleSequence([revify.Reversible(Branch(3), Branch(3)) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.sequence(*x.chunk(2, 1)), 1)


def plain(depth: int = 4) -> Net:
    return Net(nn.Sequential(*(Block(6) for _ in range(depth))))


def images() -> Tensor:
    return torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))


FORMS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: revify.convert(plain(), images(), transitions="keep"),
    "split": lambda: revify.convert(plain(), images(), streams="split"),
    "by hand": lambda: Net(Halves(4)),
    "recomputed": lambda: revify.convert(plain(), images(), transitions="checkpoint"),
}


def same(model: nn.Module, step: Callable[[nn.Module], object]) -> bool:
    """Whether gradients and buffers after `step` are the same in both backwards; the model starts alike."""
    state, found = {name: t.clone() for name, t in model.state_dict().items()}, []
    for ordinary in (True, False):
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        with revify.plain_backward() if ordinary else nullcontext():
            result = step(model)
        grads = [p.grad for p in model.parameters()] if result is None else list(result)
        found.append([*grads, *(b.clone() for b in model.buffers())])
    pairs = zip(*found, strict=True)
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        yield


def loss(model: nn.Module, dtype: torch.dtype, x: Tensor | None = None) -> Tensor:
    with precision(dtype):
        return model(images() if x is None else x).float().square().sum()


def two_forwards(model: nn.Module, dtype: torch.dtype) -> None:
    one, two = loss(model, dtype), loss(model, dtype, images().flip(0))
    one.backward()
    two.backward()


def retained(model: nn.Module, dtype: torch.dtype) -> None:
    value = loss(model, dtype)
    value.backward(retain_graph=True)
    value.backward()


def reused(model: nn.Module, dtype: torch.dtype) -> None:
    x = images().requires_grad_() * 2
    (loss(model, dtype, x) + x.square().sum()).backward()


def evaluated(model: nn.Module, dtype: torch.dtype) -> None:
    model.eval()
    loss(model, dtype).backward()
    model.train()


def asked(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(model, dtype), list(model.parameters()), allow_unused=True)


def twice(model: nn.Module, dtype: torch.dtype) -> None:
    x = images().requires_grad_()
    (slope,) = torch.autograd.grad(loss(model, dtype, x), x, create_graph=True)
    slope.square().sum().backward()


def without(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    model.eval()
    x = images()
    with torch.no_grad(), precision(dtype):
        values = [model(x), model(x), x.clone()]
    model.train()
    return [*values, torch.tensor(torch.equal(values[0], values[1]) and torch.equal(x, images()))]


ROWS: dict[str, Callable[[nn.Module, torch.dtype], object]] = {
    "gradients, dropout and BatchNorm statistics (once a step)": lambda m, d: loss(m, d).backward(),
    "two forwards, then both backwards": two_forwards,
    "second backward with retain_graph": retained,
    "input with a gradient": lambda m, d: loss(m, d, images().requires_grad_()).backward(),
    "input reused by something else": reused,
    "autograd.grad of the parameters": asked,
    "double backward": twice,
    "eval mode and backward": evaluated,
    "under no_grad": without,
}


def main() -> None:
    """Run every cell and write the page."""
    torch.set_num_threads(1)
    columns = [(form, name) for form in FORMS for name in PRECISIONS]
    lines = [
        "# Behaviour",
        "",
        f"Written by `python benchmarks/behaviour.py` with torch {torch.__version__.split('+')[0]}. Each cell is a run of a",
        'small network: "equal" means that gradients and buffers are those of ordinary autograd on the same network, bit for',
        'bit. In the columns "recomputed" what lies outside of the stage runs again as well.',
        "",
        f"| | {' | '.join(f'{form}, {name}' for form, name in columns)} |",
        f"|{'---|' * (len(columns) + 1)}",
    ]
    for row, step in ROWS.items():
        cells = []
        for form, name in columns:
            torch.manual_seed(0)
            model = FORMS[form]().train()
            try:
                cells.append("equal" if same(model, lambda m, n=name, s=step: s(m, PRECISIONS[n])) else "**different**")
            except revify.RevifyError as error:
                cells.append(f"{type(error).__name__}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
