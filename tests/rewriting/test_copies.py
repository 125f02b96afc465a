"""A converted model, and a reverted one, is a copy in which everything speaks of the copy; the given one stays as it is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import branch_nets
import pytest
import torch
import zoo
from asserts import Unchanged, assert_same_gradients, converted, inputs_of
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import revify

BF16 = torch.bfloat16

# Forwards of an instance of its own


def closure(module: nn.Module) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def doubled(*args: Any, **kwargs: Any) -> Tensor:
        return inner(*args, **kwargs) * 2

    module.forward = doubled


def default(module: nn.Module) -> None:
    module.forward = lambda *args, inner=module.forward, **kwargs: inner(*args, **kwargs) * 2


def partially(module: nn.Module) -> None:
    def doubled(owner: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return owner.before(*args, **kwargs) * 2

    module.before = module.forward
    module.forward = functools.update_wrapper(functools.partial(doubled, module), module.forward)


def method(module: nn.Module) -> None:
    def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return self.before(*args, **kwargs) * 2

    module.before = module.forward
    module.forward = doubled.__get__(module)


class Doubled:
    def __init__(self, inner: Callable[..., Tensor]) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs) * 2


def an_object(module: nn.Module) -> None:
    module.forward = Doubled(module.forward)


def an_object_in_a_closure(module: nn.Module) -> None:
    inner = Doubled(module.forward)
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def twice(module: nn.Module) -> None:
    closure(module)
    module.forward = torch.autocast("cpu", BF16, enabled=False)(module.forward)


def compiled(module: nn.Module) -> None:
    closure(module)
    module.forward = torch.compile(module.forward, backend="eager")


WRAPPERS = [closure, default, partially, method, an_object, an_object_in_a_closure, twice]


@pytest.mark.parametrize("wrap", [*WRAPPERS, compiled])
@pytest.mark.parametrize("where", ["", "blocks.3", "blocks.1.up", "stem", "head"])
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.sampled(4)
def test_revert_sees_through_a_forward_wrapped_after_conversion(
    wrap: Callable[[nn.Module], None], where: str, unit: str
) -> None:
    given = zoo.DropoutAndDropPath().eval()
    if unit == "branch":
        given, where = branch_nets.net(branch_nets.Two, 4).eval(), where.replace(".up", ".one")
    x = inputs_of(given)
    model = revify.convert(given, x[0], unit=unit, bits=1)
    wrap(model.get_submodule(where))
    with torch.no_grad():
        changed = model(*x)
        found = revify.revert(model)(*x)
        assert torch.equal(model(*x), changed), "the converted model stays as it was"
        wrap(given.get_submodule(where))
        assert torch.equal(found, given(*x))
        assert not torch.equal(found, changed)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("where", ["", "blocks.3", "blocks.1.up", "stem", "head"])
def test_forwards_wrapped_before_conversion_are_kept(wrap: Callable[[nn.Module], None], where: str) -> None:
    """The copy's wrapper calls the copy: it goes into eval mode, and back to the plain model, with it."""
    torch.manual_seed(0)
    given = zoo.DropoutAndDropPath()
    x = inputs_of(given)
    wrap(given.get_submodule(where))
    with Unchanged(given):
        model = revify.convert(given, x[0], bits=1)
    assert len(model.revify_plan.stages[0].blocks) == 4
    assert_same_gradients(model, x)
    model.eval()
    with torch.no_grad():
        first = model(*x)
        assert torch.equal(model(*x), first), "a part of the model is still in train mode"
        assert torch.equal(revify.revert(model)(*x), given.eval()(*x))


def test_a_wrapper_that_is_not_called_with_its_block_gives_the_function_that_it_makes() -> None:
    plain, wrapped = zoo.PreNormBlocks(), zoo.PreNormBlocks()
    wrapped.load_state_dict(plain.state_dict())
    closure(wrapped.blocks[3])
    x = inputs_of(plain)
    last = [revify.convert(m, x[0], predictor="zero", bits=8)(*x) for m in (plain, wrapped)]
    torch.testing.assert_close(last[1] - wrapped.head.bias, 2 * (last[0] - plain.head.bias), rtol=0.05, atol=0.05)


def test_branches_of_a_block_with_a_forward_of_its_own_are_refused() -> None:
    model = branch_nets.net(branch_nets.Two)
    plan = revify.plan(model, model.example(), unit="branch")
    closure(model.blocks[2])
    with pytest.raises(revify.RefusalError, match=r"the forward of blocks.2 was replaced on the instance.*unit=.block"):
        revify.convert(model, plan=plan)


def test_a_forward_compiled_in_place_is_refused_with_its_path() -> None:
    model = zoo.PreNormBlocks()
    compiled(model.blocks[2])
    with pytest.raises(revify.RefusalError, match=r"compiled with torch.compile.*blocks.2"):
        revify.convert(model, model.example())


model_by_a_global_name: nn.Module | None = None


def test_a_wrapper_that_reaches_the_model_by_a_global_name_is_refused_with_its_path() -> None:
    global model_by_a_global_name  # what the test is about
    model = model_by_a_global_name = converted(zoo.PreNormBlocks)
    inner = model.blocks[1].forward
    model.blocks[1].forward = lambda x: inner(x) + model_by_a_global_name.head.bias.sum()
    with pytest.raises(revify.RefusalError, match=r"blocks.1.forward .*global name 'model_by_a_global_name'"):
        revify.revert(model)
    model_by_a_global_name = None


# Attributes that have no copy


class Keeps(zoo.Mlp):
    """A block that keeps what it computed, in several ways, and a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.kept = threading.Lock(), {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.map = self.up(x).softmax(-1)
            self.kept["all"] = [self.map, (self.map * 2,)]
            return super().forward(x) + self.down(self.map)


class KeepsWhatItComputed(zoo.Net):
    def __init__(self) -> None:
        super().__init__(*(Keeps() for _ in range(4)))
        self.locks = [threading.RLock()]


def test_kept_tensors_and_locks_are_no_obstacle(tmp_path: Any) -> None:
    given = KeepsWhatItComputed()
    x = inputs_of(given)
    given(*x).sum().backward()
    revify.plan(given, x)
    model = revify.convert(given, x)
    assert_same_gradients(model, x)
    (model(*x).square().mean() + sum(block.map.square().sum() for block in model.blocks)).backward()
    plain = revify.revert(model)
    assert plain.blocks[1].up.weight is model.blocks[1].up.weight is given.blocks[1].up.weight
    assert torch.equal(plain(*x), given(*x))
    fitted = revify.calibrate(model, x[0], predictor="diagonal", bits=1)
    revify.save(fitted, tmp_path / "model.safetensors")
    assert torch.equal(revify.load(tmp_path / "model.safetensors", given)(*x), fitted(*x))


def test_lists_are_not_shared_with_the_given_model() -> None:
    given = KeepsWhatItComputed()
    model = revify.convert(given, given.example())
    model.blocks[0].kept["all"].append("mine")
    assert given.blocks[0].kept["all"] == []


def test_a_tensor_computed_from_a_parameter_keeps_its_gradient() -> None:
    class Doubles(zoo.PreNormBlocks):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6))
            self.doubled = self.table * 2

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.doubled)

    given = Doubles()
    x = inputs_of(given)
    revify.convert(given, x)(*x).sum().backward(retain_graph=True)
    assert given.table.grad is not None


def test_what_cannot_be_copied_is_named() -> None:
    class Stubborn:
        def __init__(self) -> None:
            self.parts = ["some"]

        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("no copy of this")

    model = zoo.PreNormBlocks()
    model.blocks[1].helper = Stubborn()
    with pytest.raises(revify.RefusalError, match=r"blocks.1.helper, a Stubborn, cannot be copied: no copy of this"):
        revify.convert(model, model.example())


@pytest.mark.parametrize("change", [weight_norm, spectral_norm])
def test_weights_made_by_a_hook_before_conversion(change: Callable[[nn.Module], nn.Module]) -> None:
    given = zoo.PreNormBlocks()
    for block in given.blocks:
        change(block.up)
    x = inputs_of(given)
    model = revify.convert(given, x)
    if change is weight_norm:
        assert_same_gradients(model, x)
    assert torch.equal(revify.revert(model).eval()(*x), given.eval()(*x))


def test_weights_pruned_after_conversion() -> None:
    model = converted(zoo.PostActivationBatchNorm, bits=1)
    for block in model.blocks:
        prune.l1_unstructured(block.conv1, "weight", 0.5)
    x = inputs_of(model)
    assert_same_gradients(model, x)
    plain = revify.revert(model)
    assert plain.blocks[0].conv1.weight_orig is model.blocks[0].conv1.weight_orig
    assert float((plain.blocks[0].conv1.weight == 0).float().mean()) == 0.5


class Configuration(NamedTuple):
    """As torch's QConfig, which holds functions that close over the module that they are for."""

    make: Callable[[], Any]
    bits: int


def test_a_named_tuple_that_reaches_the_model_speaks_of_the_copy() -> None:
    model = zoo.PreNormBlocks()
    model.settings = Configuration(lambda: model, 8)
    made = revify.convert(model, model.example())
    assert type(made.settings) is Configuration
    assert made.settings.make() is made
    assert model.settings.make() is model
