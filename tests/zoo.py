"""Small networks, each named after what makes it difficult. None has anything else that could go wrong.

Every network says what it is run on (`example`), and which blocks a plan must find in it (`STAGES`, none in a refused
one). Widths are odd or small on purpose: packed bits must not depend on round sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, IMAGE = (2, 5, 6), (2, 6, 4, 5)


def paths(*names: str, count: int = 4) -> tuple[tuple[str, ...], ...]:
    """The stages' block paths: `count` children of each of the named containers."""
    return tuple(tuple(f"{name}.{i}" for i in range(count)) for name in names)


class Net(nn.Module):
    """A stem, blocks in a row, a head over the mean: what the networks below vary."""

    STAGES = paths("blocks")
    SHAPE = TOKENS
    POOLED: tuple[int, ...] = (1,)
    CLASSIFIER = 3

    def __init__(self, *blocks: nn.Module, width: int | None = None) -> None:
        super().__init__()
        width = width or (self.SHAPE[2] if len(self.SHAPE) == 3 else self.SHAPE[1])
        self.stem = nn.Linear(width, width) if len(self.SHAPE) == 3 else nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, self.CLASSIFIER)

    def example(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.SHAPE),)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(self.POOLED))


# Blocks that are convertible


class Mlp(nn.Module):
    """The plain pre-norm block."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class PreNormBlocks(Net):
    def __init__(self, depth: int = 4) -> None:
        super().__init__(*(Mlp() for _ in range(depth)))


class OddChannels(Net):
    """2·3·7 = 42 elements: no number of residue bits fills its bytes."""

    SHAPE = (2, 3, 7)

    def __init__(self) -> None:
        super().__init__(*(Mlp(7) for _ in range(4)))


class BlocksInSequential(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Mlp() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(1))


class Attention(nn.Module):
    """Two additions in one block, attention with its own dropout, a learned scale on each branch."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.mlp(x + self.out(attended) * self.scale)


class TwoAdditionsInABlock(Net):
    def __init__(self) -> None:
        super().__init__(*(Attention() for _ in range(4)))


class DropoutAndDropPath(Net):
    """Numbers are drawn twice in each block, the second time for whole examples."""

    class Block(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(self.up(self.norm(x)), 0.3, self.training)
            keep = (torch.rand_like(x[:, :1, :1]) > 0.2).to(x.dtype) if self.training else 1.0
            return x + self.down(F.gelu(y)) * keep

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))


class Convolutions(nn.Module):
    """conv-norm-relu-conv-norm beside the shortcut, in the order of ResNet; activations in place."""

    def __init__(self, width: int = 6, after: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act, self.after = nn.ReLU(inplace=True), after

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += x
        return self.act(y) if self.after else y


class PostActivationBatchNorm(Net):
    SHAPE, POOLED = IMAGE, (2, 3)

    def __init__(self) -> None:
        super().__init__(*(Convolutions() for _ in range(4)))


class InPlaceActivations(Net):
    SHAPE, POOLED = IMAGE, (2, 3)

    def __init__(self) -> None:
        super().__init__(*(Convolutions(after=False) for _ in range(4)))


class ChannelsLast(Net):
    SHAPE, POOLED = IMAGE, (2, 3)

    def __init__(self) -> None:
        super().__init__(*(Convolutions(after=False) for _ in range(4)))

    def example(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.SHAPE).contiguous(memory_format=torch.channels_last),)


class ChangesLayout(Net):
    """The two values before each block have other strides than its output."""

    SHAPE, POOLED = IMAGE, (2, 3)

    class Block(nn.Module):
        def __init__(self, flip: bool) -> None:
            super().__init__()
            self.mix, self.flip = nn.Linear(6, 6), flip

        def forward(self, x: Tensor) -> Tensor:
            y = self.mix(x.permute(0, 2, 3, 1)).tanh().permute(0, 3, 1, 2)
            return y + x if self.flip else x.contiguous() + y.contiguous()

    def __init__(self) -> None:
        super().__init__(*(self.Block(i in (1, 2)) for i in range(4)))


class ScaledSkip(Net):
    class Block(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.skip = nn.Parameter(torch.full((6,), 0.9))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.skip + self.down(F.gelu(self.up(self.norm(x))))

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))


class PostNorm(Net):
    class Block(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.down(F.gelu(self.up(x))))

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))


class DroppedSum(Net):
    """The sum, not the branch, is dropped out."""

    class Block(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x + self.down(F.gelu(self.up(self.norm(x)))))

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))


class BranchIsSubtracted(Net):
    class Block(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return x - self.down(F.gelu(self.up(self.norm(x))))

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))


class SumsByOtherNames(Net):
    """lerp and addcmul."""

    class Block(Mlp):
        def __init__(self, way: int) -> None:
            super().__init__()
            self.way = way

        def forward(self, x: Tensor) -> Tensor:
            f = self.down(F.gelu(self.up(self.norm(x)))).to(x.dtype)
            return torch.lerp(x, f, 0.3) if self.way == 0 else torch.addcmul(x, f, f)

    def __init__(self) -> None:
        super().__init__(*(self.Block(i % 2) for i in range(4)))


class SumsBehindGates(Net):
    """What is done to the sum depends on the input, too: gates before and behind it, a clamp, a mask."""

    class Block(Mlp):
        def __init__(self, way: int) -> None:
            super().__init__()
            self.way = way

        def forward(self, x: Tensor) -> Tensor:
            f, gate = self.down(F.gelu(self.up(self.norm(x)))), self.norm(x).sigmoid()
            if self.way == 0:
                return (f + x) * gate
            if self.way == 1:
                return f * gate + x * (1 - gate)
            return (f + x).clamp(-2, 2) if self.way == 2 else torch.where(gate > 0.4, f + x, x)

    def __init__(self) -> None:
        super().__init__(*(self.Block(i) for i in range(4)))


class SumsOfStacks(Net):
    """The sum or the mean of a stack, a constant taken off, and the sum made a tensor again."""

    class Block(Mlp):
        def __init__(self, way: int) -> None:
            super().__init__()
            self.way = way

        def forward(self, x: Tensor) -> Tensor:
            f = self.down(F.gelu(self.up(self.norm(x))))
            if self.way == 0:
                return torch.stack((f, x)).sum(0)
            if self.way == 1:
                return torch.stack([f, x], -1).mean(-1)
            return f + x - 0.5 if self.way == 2 else torch.as_tensor(f + x)

    def __init__(self) -> None:
        super().__init__(*(self.Block(i) for i in range(4)))


class NoParametersInBlocks(Net):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(x) * x

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))


class SharedModuleInBlock(Net):
    """One Linear is called twice in a block, and one block's norm is also the next one's."""

    class Block(nn.Module):
        def __init__(self, norm: nn.LayerNorm) -> None:
            super().__init__()
            self.norm, self.mix, self.drop = norm, nn.Linear(6, 6), nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(self.mix(self.norm(x)))
            return x + self.drop(self.mix(F.gelu(y)))

    def __init__(self) -> None:
        norm = nn.LayerNorm(6)
        super().__init__(*(self.Block(norm) for _ in range(4)))


class SideInputsWithGradient(Net):
    """Positions by position, a mask by keyword, both learned; a size that is no tensor; the stream by keyword."""

    class Block(Mlp):
        def forward(self, rope: Tensor, size: tuple[int, int], *, mask: Tensor | None = None, x: Tensor) -> Tensor:
            y = self.up(self.norm(x) * rope) / size[0]
            return x + self.down(F.gelu(y)) * (1 if mask is None else mask)

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))
        self.rope, self.mask = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.rand(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, rope, mask = self.stem(x), self.rope.cos(), self.mask.sigmoid()
        for block in self.blocks:
            x = block(rope, (2, 3), mask=mask, x=x)
        return self.head(x.mean(1))


class StreamIsASideInput(Net):
    """The first block's output is given to every block again (a memory, as in cross attention)."""

    class Block(Mlp):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x)))) * memory.mean(1, keepdim=True)

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = memory = self.stem(x)
        for block in self.blocks:
            x = block(x, memory)
        return self.head((x + memory).mean(1))


class FrozenStart(Net):
    """Stem and first blocks are not trained, so that the stream has no gradient there."""

    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(4)))
        for part in (self.stem, self.blocks[0], self.blocks[1]):
            part.requires_grad_(False)


class FrozenMiddle(Net):
    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(4)))
        self.blocks[1].requires_grad_(False)
        self.blocks[2].up.requires_grad_(False)


class AuxiliaryLoss(Net):
    """A second head looks at a value in the middle of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1:
                middle = self.head(x.mean(1))
        return torch.cat([middle, self.head(x.mean(1))])

    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(4)))


class TwoStages(Net):
    """Two widths with a strided transition between them that draws numbers and counts batches."""

    STAGES = paths("stages.0", "stages.1", count=3)
    SHAPE, POOLED = IMAGE, (2, 3)

    def __init__(self) -> None:
        super().__init__(width=6)
        self.blocks = None
        first = nn.Sequential(*(Convolutions(6) for _ in range(3)))
        second = nn.Sequential(*(Convolutions(9) for _ in range(3)))
        self.stages = nn.ModuleList([first, second])
        self.transition = nn.Sequential(
            nn.Conv2d(6, 9, 2, stride=2), nn.BatchNorm2d(9), nn.Dropout(0.2), nn.GELU(), nn.Conv2d(9, 9, 1)
        )
        self.head = nn.Linear(9, self.CLASSIFIER)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(self.stages[0](self.stem(x)))
        return self.head(self.stages[1](x).mean((2, 3)))


class LayersInARow(Net):
    """Outside of the stage, single layers are called one after the other, one of them in place, one with random numbers."""

    STAGES = paths("blocks", count=3)
    SHAPE, POOLED = IMAGE, (2, 3)

    def __init__(self) -> None:
        super().__init__(*(Convolutions(6) for _ in range(3)), width=6)
        self.norm, self.act, self.drop, self.pool = (
            nn.BatchNorm2d(6),
            nn.ReLU(True),
            nn.Dropout(0.2),
            nn.MaxPool2d(3, 1, 1),
        )
        self.last_norm, self.last_act = nn.BatchNorm2d(6), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.drop(self.act(self.norm(self.stem(x)))))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last_act(self.last_norm(x)).mean((2, 3)))


class BlocksInGroups(Net):
    """Three groups of four blocks each, and each group adds to its own input: the groups are a run of blocks, too."""

    STAGES = tuple(tuple(f"blocks.{group}.body.{i}" for i in range(4)) for group in range(3))

    class Group(nn.Module):
        def __init__(self, *blocks: nn.Module) -> None:
            super().__init__()
            self.body, self.last = nn.Sequential(*blocks), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(x)) + x

    def __init__(self, *groups: nn.Module) -> None:
        super().__init__(*(groups or (self.Group(*(Mlp() for _ in range(4))) for _ in range(3))))


class BranchesOnData(Net):
    """torch.fx cannot trace it as a whole, and it does not run without data."""

    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if x.sum() > 0 else x)


class DrawsNumbersOutsideTheBlocks(Net):
    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.rand(()))


class TakesTwoInputs(Net):
    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(4)))

    def example(self) -> tuple[Tensor, ...]:
        return torch.randn(self.SHAPE), torch.randn(self.SHAPE[0], 1, 6)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x + shift)


# Networks whose additions are in a loop over branches: the module that loops is cut, "" being the model itself


def branch(width: int = 6) -> nn.Sequential:
    """What a loop adds."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class ResidualsInALoop(Net):
    """The additions are in the network's own forward: no module could be given another one."""

    STAGES = (("",),)

    def __init__(self) -> None:
        super().__init__(*(branch() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


class LoopInAContainer(Net):
    """A module of the network loops over pairs of branches; it has a learned scale of its own, and ends with a norm."""

    STAGES = (("blocks.0",),)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList([branch(), branch()]) for _ in range(3))
            self.scale, self.norm = nn.Parameter(torch.full((6,), 0.5)), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            for one, two in self.layers:
                x = one(x) * self.scale + x
                y = two(x)
                y += x
                x = y
            return self.norm(x)

    def __init__(self) -> None:
        super().__init__(self.Layers())


class LoopWithSideInputs(Net):
    """Each step is given a mask, a learned position that the loop computes, and a number; the result comes in a tuple."""

    STAGES = (("blocks.0",),)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(branch() for _ in range(4))
            self.position = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor, *, mask: Tensor, scale: float = 0.5, more: None = None) -> tuple[Tensor, Tensor]:
            position, size = self.position.cos(), x.shape[1]
            for layer in self.layers:
                x = x + layer(x * position) * mask * scale / size
            return x, position

    def __init__(self) -> None:
        super().__init__(self.Layers())
        self.mask = nn.Parameter(torch.rand(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, position = self.blocks[0](self.stem(x), mask=self.mask.sigmoid())
        return self.head(x.mean(1) + position.mean(0))


class OneBranchForAllSteps(Net):
    """One module is called four times, with dropout."""

    STAGES = (("",),)

    def __init__(self) -> None:
        super().__init__(nn.Sequential(branch(), nn.Dropout(0.2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = x + self.blocks[0](x)
        return self.head(x.mean(1))


class BranchesSideBySide(Net):
    """x + one(x) + two(x) is one step."""

    STAGES = (("",),)

    def __init__(self) -> None:
        super().__init__(*(nn.ModuleList([branch(), branch()]) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for one, two in self.blocks:
            x = x + one(x) + two(x)
        return self.head(x.mean(1))


class NormsAfterTheSums(Net):
    """The norm of each sum is the next step's stream."""

    STAGES = (("",),)

    def __init__(self) -> None:
        super().__init__(*(nn.ModuleList([branch(), nn.LayerNorm(6)]) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part, norm in self.blocks:
            x = norm(x + part(x))
        return self.head(x.mean(1))


class SkipAroundTheLoop(Net):
    """What goes into the loop is added once more behind it, and the value in the middle goes to the head, too."""

    STAGES = (("",),)

    def __init__(self) -> None:
        super().__init__(*(branch() for _ in range(4)))
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = x + block(x)
            if number == 1:
                middle = x
        return self.head((self.last(x) + first).mean(1) + middle.mean(1))


class TwoLoops(Net):
    """Two runs in one forward, with other widths, batch norms and a layer in place."""

    STAGES = (("",), ("",))
    SHAPE = IMAGE

    def __init__(self) -> None:
        super().__init__()

        def convolutions(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))

        self.blocks = nn.ModuleList(nn.ModuleList(convolutions(width) for _ in range(3)) for width in (6, 9))
        self.between, self.head = nn.Conv2d(6, 9, 2, stride=2), nn.Linear(9, self.CLASSIFIER)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks[0]:
            x = x + block(x)
        x = self.between(x)
        for block in self.blocks[1]:
            x = block(x) + x
        return self.head(x.mean((2, 3)))


class ReusedBlock(Net):
    """One block for all layers, as in ALBERT."""

    STAGES = (("",),)

    def __init__(self) -> None:
        super().__init__(Mlp())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = self.blocks[0](x)
        return self.head(x.mean(1))


LOOPS: dict[type[Net], tuple[int, ...]] = {
    ResidualsInALoop: (4,),
    LoopInAContainer: (6,),
    LoopWithSideInputs: (4,),
    OneBranchForAllSteps: (4,),
    ReusedBlock: (4,),
    BranchesSideBySide: (3,),
    NormsAfterTheSums: (4,),
    SkipAroundTheLoop: (4,),
    TwoLoops: (3, 3),
}


# Networks whose modules are steps, but not one on what the one before returned


class PositionsBetweenTheBlocks(Net):
    """Between two blocks the stream gets a position, a gate and dropout."""

    APART = ("blocks.*",)

    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(4)))
        self.position, self.gate = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = F.dropout(block(x) + number * self.position, 0.1, self.training) * self.gate(x).sigmoid()
        return self.head(x.mean(1))


class AxesSwappedBetweenTheBlocks(Net):
    """Every other block sees the transposed stream: two shapes."""

    APART = ("blocks.*",)

    def __init__(self) -> None:
        super().__init__(*(Mlp(width) for width in (6, 5, 6, 5, 6, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).transpose(1, 2)
        return self.head(x.mean(1))


class LoopThatOnlyARunShows(Net):
    """The loop adds, and asks for values, so that torch.fx cannot trace it."""

    APART = ("blocks.*",)

    def __init__(self) -> None:
        super().__init__(*(branch() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x) if x.abs().sum() > 0 else x
        return self.head(x.mean(1))


class OneBlockAsOftenAsTheDataSay(Net):
    """One block, its result in a tuple beside another, is called in a loop that torch.fx cannot trace."""

    APART = ("blocks.0",)

    class Block(Mlp):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y.mean((1, 2)), y

    def __init__(self) -> None:
        super().__init__(self.Block())

    def forward(self, x: Tensor) -> Tensor:
        x, means = self.stem(x), 0
        for _ in range(4 if x.abs().sum() > 0 else 5):
            mean, x = self.blocks[0](x * 0.9)
            means = means + mean
        return self.head(x.mean(1)) + means[:, None]


class StreamIsQueryKeyAndValue(Net):
    """The modules of the loop are given the stream three times, as attention is."""

    APART = ("blocks.*",)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.mix(q), k, v)

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x, x, x) if x.abs().sum() > 0 else x
        return self.head(x.mean(1))


APART: dict[type[Net], tuple[int, ...]] = {
    PositionsBetweenTheBlocks: (4,),
    AxesSwappedBetweenTheBlocks: (3, 3),
    LoopThatOnlyARunShows: (4,),
    OneBlockAsOftenAsTheDataSay: (4,),
    StreamIsQueryKeyAndValue: (4,),
}


# Networks without a stage


class ChangesInputInPlace(Net):
    STAGES = ()

    class Block(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(torch.relu_(x)))

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(3)))


class DenseConcat(Net):
    STAGES = ()

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.grow = nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.grow(x)], -1)

    def __init__(self) -> None:
        super().__init__(*(self.Block(6 + 2 * i) for i in range(3)))
        self.head = nn.Linear(12, self.CLASSIFIER)


class NoShortcut(Net):
    STAGES = ()

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3)))


class ReturnsTuples(Net):
    """The stream is the second of three results; the first has a gradient, the third is no tensor."""

    STAGES = paths("blocks", count=3)

    class Block(Mlp):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:  # type: ignore[override]
            y = super().forward(x)
            return self.norm(y).mean(1), y, 1

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x, pooled = self.stem(x), 0
        for block in self.blocks:
            mean, x, one = block(x)
            pooled = pooled + one * mean.square()
        return self.head(x.mean(1) + pooled)


class UntraceableBlocks(Net):
    STAGES = paths("blocks", count=3)

    class Block(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) else x

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(3)))


class SingleBlocks(Net):
    """Every residual block has another width than its neighbours."""

    STAGES = ()

    def __init__(self) -> None:
        super().__init__(Mlp(6), nn.Linear(6, 4), Mlp(4), nn.Linear(4, 6), Mlp(6))


CONVERTIBLE: tuple[type[Net], ...] = (
    PreNormBlocks,
    OddChannels,
    BlocksInSequential,
    TwoAdditionsInABlock,
    DropoutAndDropPath,
    PostActivationBatchNorm,
    InPlaceActivations,
    ChannelsLast,
    ChangesLayout,
    ScaledSkip,
    PostNorm,
    DroppedSum,
    BranchIsSubtracted,
    SumsByOtherNames,
    SumsBehindGates,
    SumsOfStacks,
    NoParametersInBlocks,
    SharedModuleInBlock,
    SideInputsWithGradient,
    StreamIsASideInput,
    FrozenStart,
    FrozenMiddle,
    AuxiliaryLoss,
    TwoStages,
    LayersInARow,
    BlocksInGroups,
    BranchesOnData,
    DrawsNumbersOutsideTheBlocks,
    TakesTwoInputs,
    ReturnsTuples,
    UntraceableBlocks,
)

REFUSED: dict[type[Net], str] = {
    ChangesInputInPlace: "changes its input in place",
    DenseConcat: "its output is concatenated with its input",
    NoShortcut: "no path of additions leads from its input to its output",
    SingleBlocks: "is a residual block, but neither the module before it nor the one after it continues its stream",
}
