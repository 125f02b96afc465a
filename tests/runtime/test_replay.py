"""What repeats when a block runs twice repeats; what must happen once does not happen again."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from revify.errors import StreamError
from revify.runtime.conditions import Conditions
from revify.runtime.randomness import Draws
from revify.runtime.replay import SideInputs, version
from revify.runtime.states import Habits

CPU = torch.device("cpu")


def recorded(module: nn.Module) -> AbstractContextManager[Conditions]:
    return Conditions.recorded(module, CPU, Habits(), Draws())


def test_random_numbers_repeat_and_the_generator_goes_on_as_if_nothing_happened() -> None:
    with recorded(nn.Identity()) as conditions:
        first = torch.rand(4)
    state = torch.get_rng_state()
    torch.rand(7)
    moved = torch.get_rng_state()
    with conditions.restored():
        again = torch.rand(4)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), moved)
    assert not torch.equal(moved, state)


def test_no_random_state_is_kept_where_no_numbers_were_drawn() -> None:
    with recorded(nn.Identity()) as silent:
        torch.ones(3) + 1
    with recorded(nn.Identity()) as drawing:
        torch.rand(1)
    assert not silent.random
    assert set(drawing.random) == {CPU}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_repeats_outside_of_it(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype), recorded(nn.Identity()) as conditions:
        pass
    with conditions.restored():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype
    assert not torch.is_autocast_enabled("cpu")


def test_no_autocast_repeats_inside_of_it() -> None:
    with recorded(nn.Identity()) as conditions:
        pass
    with torch.autocast("cpu", torch.bfloat16):
        with conditions.restored():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_each_part_is_in_the_mode_it_was_in() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[1][0].eval()
    before = [m.training for m in module.modules()]
    with recorded(module) as conditions:
        pass
    module.eval()
    module[1][1].train()
    between = [m.training for m in module.modules()]
    with conditions.restored():
        assert [m.training for m in module.modules()] == before
    assert [m.training for m in module.modules()] == between


def test_buffers_are_read_but_not_written() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    with recorded(norm) as conditions:
        norm(x)
    held = dict(norm.named_buffers())
    kept = {name: buffer.clone() for name, buffer in held.items()}
    with conditions.restored():
        assert torch.equal(norm.running_mean, kept["running_mean"])
        norm(x)
        assert norm.num_batches_tracked == 2
    for name, buffer in norm.named_buffers():
        assert buffer is held[name]
        assert torch.equal(buffer, kept[name])


def test_gradients_are_on_within() -> None:
    with recorded(nn.Identity()) as conditions:
        pass
    with torch.no_grad():
        with conditions.restored():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_everything_is_put_back_when_the_body_fails() -> None:
    norm = nn.BatchNorm1d(3)
    with recorded(norm) as conditions:
        torch.rand(1)
    norm.eval()
    state, mean = torch.get_rng_state(), norm.running_mean

    def fail() -> None:
        with conditions.restored():
            torch.rand(5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.running_mean is mean
    assert not norm.training
    assert not torch.is_autocast_enabled("cpu")


def test_side_inputs_come_back_in_their_places_cut_off_from_the_graph() -> None:
    leaf = torch.ones(2, requires_grad=True)
    mask, positions = leaf * 2, torch.arange(3)
    side = SideInputs.of((None, (4, mask)), {"rope": [positions, "text"], "size": 7})
    args, kwargs = side.again()
    assert args[0] is None
    assert args[1][0] == 4
    assert torch.equal(args[1][1], mask)
    assert args[1][1].requires_grad
    assert args[1][1].grad_fn is None
    assert not kwargs["rope"][0].requires_grad
    assert torch.equal(kwargs["rope"][0], positions)
    assert kwargs["rope"][1] == "text"
    assert kwargs["size"] == 7
    assert [tuple(t.shape) for t in side.tensors()] == [(2,), (3,)]


def test_side_inputs_share_memory_with_what_was_given() -> None:
    mask = torch.ones(3)
    args, _ = SideInputs.of((mask,), {}).again()
    assert args[0].data_ptr() == mask.data_ptr()


def test_changed_side_input_is_an_error_that_names_its_shape() -> None:
    mask = torch.ones(3, 4)
    side = SideInputs.of((), {"mask": mask})
    mask.add_(1)
    with pytest.raises(
        StreamError, match=r"side input of shape \(3, 4\) was changed in place between forward and backward"
    ):
        side.again()


def test_version_counts_changes_and_bears_inference_tensors() -> None:
    x = torch.ones(2)
    before = version(x)
    x.add_(1)
    assert version(x) == before + 1
    with torch.inference_mode():
        y: Tensor = torch.ones(2)
        y.add_(1)
    assert version(y) == 0
