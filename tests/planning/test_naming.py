"""Stages that a user names: the same bits in both backwards, memory as planned, and a sentence where they cannot be."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import zoo
from asserts import Unchanged, assert_same, assert_same_gradients, inputs_of, run
from torch import Tensor, nn

import revify
from revify import Method, Plan
from revify.measuring.memory import count_memory
from revify.runtime.codes import code_bytes
from revify.stage_plans import StagePlan

NAMED = {**{kind: kind.APART for kind in zoo.APART}, zoo.NoShortcut: ("blocks.*",), zoo.PreNormBlocks: ("blocks.*",)}


def named(kind: type[zoo.Net], **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    return revify.convert(model, model.example(), stages=NAMED[kind], **options)


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize(("bits", "autocast"), [(8, None), (3, None), (4, torch.bfloat16)])
def test_gradients_are_those_of_autograd_bit_for_bit(
    kind: type[zoo.Net], bits: int, autocast: torch.dtype | None
) -> None:
    model = named(kind, bits=bits)
    assert_same_gradients(model, inputs_of(model), autocast=autocast)


@pytest.mark.parametrize("kind", zoo.APART)
def test_the_plan_says_what_lies_apart(kind: type[zoo.Net]) -> None:
    model = kind()
    example = model.example()
    with Unchanged(model):
        plan = revify.plan(model, example, stages=kind.APART)
    assert tuple(stage.length for stage in plan.stages) == zoo.APART[kind]
    assert all(stage.within == "" for stage in plan.stages)
    assert Plan.from_json(plan.to_json()) == plan


def test_modules_without_a_shortcut_form_a_chain() -> None:
    plan = revify.plan(zoo.NoShortcut(), zoo.NoShortcut().example(), stages=["blocks.*"])
    assert [(block.path, block.shortcut) for block in plan.stages[0].blocks] == [
        (f"blocks.{number}", "none") for number in range(3)
    ]
    assert plan.stages[0].within is None


@pytest.mark.parametrize("kind", NAMED)
def test_in_eval_mode_and_on_the_way_back_it_is_the_plain_model(kind: type[zoo.Net]) -> None:
    torch.manual_seed(0)
    plain = kind()
    model = revify.convert(plain, plain.example(), stages=NAMED[kind])
    assert_same(run(revify.revert(model), inputs_of(plain)), run(plain, inputs_of(plain)))
    assert_same(run(model.eval(), inputs_of(plain)), run(plain.eval(), inputs_of(plain)))


def test_a_recurrence_of_modules_without_a_shortcut() -> None:
    model = named(zoo.NoShortcut, step="recurrence")
    assert_same_gradients(model, inputs_of(model))


@pytest.mark.parametrize("kind", zoo.APART)
def test_a_copy_and_another_batch(kind: type[zoo.Net]) -> None:
    model = copy.deepcopy(named(kind))
    assert_same_gradients(model, [torch.randn(3, *x.shape[1:]) for x in inputs_of(model)])


def test_two_passes_at_once_do_not_meet() -> None:
    model = named(zoo.LoopThatOnlyARunShows)
    one, two = inputs_of(model, 3)[0], inputs_of(model, 4)[0]
    alone = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for x in (one, two)]
    losses = [model(x).square().sum() for x in (one, two)]
    for loss, expected in zip(losses, alone, strict=True):
        assert all(map(torch.equal, torch.autograd.grad(loss, list(model.parameters())), expected))


def test_a_module_called_from_elsewhere_begins_with_its_own_input() -> None:
    model = named(zoo.LoopThatOnlyARunShows)
    x = torch.randn(2, 5, 6)
    assert torch.equal(model.blocks[2](x), revify.revert(model).blocks[2](x))


def test_nothing_of_a_residual_block_is_lost_between() -> None:
    """What the code of the input leaves out is in the output again: blocks that add a constant are exact."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.ParameterList([torch.randn(6)])
            self.none = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.none(x) + self.shift[0]

    class Net(zoo.Net):
        def __init__(self) -> None:
            super().__init__(*(Constant() for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) * 2
            return x

    torch.manual_seed(0)
    net = Net()
    model = revify.convert(net, net.example(), stages=["blocks.*"], bits=2)
    x = torch.randn(2, 5, 6)
    assert (model(x) - net(x)).abs().max() < 1e-5  # sums of floats of size 50


def test_a_step_more_holds_its_code_only() -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.parts = nn.ModuleList(zoo.branch() for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x + part(x) if len(x) else x
            return x

    x, peaks = torch.randn(64, 50, 6), []
    for depth in (4, 12):
        model = revify.convert(Deep(depth), x, stages=["parts.*"], bits=4)
        model(x).sum().backward()
        peaks.append(count_memory(lambda: model(x).sum(), torch.device("cpu")).peak)  # noqa: B023
    assert peaks[1] - peaks[0] <= 8 * code_bytes(x.shape, 4) * 1.05


def test_names_may_be_given_as_one_record() -> None:
    model = zoo.NoShortcut()
    method = Method(stages=["blocks.*"])
    assert method.stages == ("blocks.*",)
    assert revify.plan(model, model.example(), method=method) == revify.plan(
        model, model.example(), stages=("blocks.0", "blocks.1", "blocks.2")
    )


class Rolls(zoo.Net):
    """A block draws from Python's generator, which no second run repeats."""

    class Block(zoo.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * random.random()

    def __init__(self) -> None:
        super().__init__(*(self.Block() for _ in range(3)))


@pytest.mark.parametrize(
    ("kind", "names", "options", "message"),
    [
        (zoo.PreNormBlocks, ["blcks.*"], {}, r"PreNormBlocks has no module 'blcks\.\*'\. Some that it has: blocks"),
        (zoo.PreNormBlocks, ["blocks"], {}, r"blocks is not called in a forward pass on this example"),
        (zoo.PreNormBlocks, ["blocks.*", "blocks.0.up"], {}, r"blocks\.0\.up lies within blocks\.0, which is named, too"),
        (zoo.PreNormBlocks, ["blocks.*.up"], {}, r"blocks\.0\.up does not keep the shape .*: \[2, 5, 6\] to \[2, 5, 12\]"),
        (zoo.PreNormBlocks, ["blocks.0"], {}, r"blocks\.0 is the only one of them with a stream of 5×6"),
        (zoo.ChangesInputInPlace, ["blocks.*"], {}, r"blocks\.0 changes its input in place"),
        (zoo.PositionsBetweenTheBlocks, ["blocks.*"], {"step": "recurrence"}, r"blocks\.1 is not given what the named"),
        (Rolls, ["blocks.*"], {}, r"blocks\.0 returns other values when it is run again"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(
    kind: type[zoo.Net], names: list[str], options: dict[str, str], message: str
) -> None:
    model = kind()
    with pytest.raises(revify.RefusalError, match=message):
        revify.plan(model, model.example(), stages=names, **options)


@pytest.mark.parametrize("names", [[], "blocks.*", [3], [""]])
def test_what_is_no_list_of_names(names: object) -> None:
    with pytest.raises(revify.RevifyError, match=r"names no modules: give a list of their paths"):
        Method(stages=names)


def test_a_plan_for_other_steps_is_at_fault() -> None:
    model = zoo.LoopThatOnlyARunShows()
    text = revify.plan(model, model.example(), stages=["blocks.*"]).to_json()
    with pytest.raises(revify.RevifyError, match="only coded steps may have something between them"):
        Plan.from_json(text.replace('"step": "coded"', '"step": "recurrence"'))
    assert isinstance(Plan.from_json(text).stages[0], StagePlan)
