"""The two views of one forward pass are right, and taking them leaves no trace in the model."""

from __future__ import annotations

import pytest
import torch
import zoo
from asserts import Unchanged
from torch import Tensor, fx, nn

from revify.errors import RefusalError
from revify.reading.observing import Call, observe
from revify.reading.tracing import meta_copy, trace


def calls_of(model: zoo.Net) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in observe(model, model.example()).calls:
        found.setdefault(call.path, []).append(call)
    return found


def test_each_blocks_output_is_the_next_ones_input() -> None:
    calls = calls_of(zoo.PreNormBlocks())
    for number in range(3):
        assert calls[f"blocks.{number}"][0].output == calls[f"blocks.{number + 1}"][0].inputs[0].key
    assert calls["stem"][0].output == calls["blocks.0"][0].inputs[0].key
    assert calls["blocks.0"][0].output != calls["blocks.2"][0].inputs[0].key


def test_calls_are_in_the_order_of_their_start() -> None:
    orders = [call.order for call in observe(zoo.PreNormBlocks(), [torch.zeros(zoo.TOKENS)]).calls]
    assert orders == list(range(len(orders)))
    paths = [call.path for call in observe(zoo.PreNormBlocks(1), [torch.zeros(zoo.TOKENS)]).calls]
    assert paths == ["stem", "blocks.0", "blocks.0.norm", "blocks.0.up", "blocks.0.down", "head"]


def test_call_says_class_shape_and_type() -> None:
    (call,) = calls_of(zoo.PreNormBlocks())["blocks.0.up"]
    assert (call.kind, call.shape, call.dtype) == ("Linear", (2, 5, 12), torch.float32)
    assert (call.inputs[0].argument, call.inputs[0].shape) == (0, (2, 5, 6))


def test_arguments_are_named_by_position_or_keyword() -> None:
    (call,) = calls_of(zoo.SideInputsWithGradient())["blocks.1"]
    assert [i.argument for i in call.inputs] == [0, "mask", "x"]


def test_changes_in_place_are_noted() -> None:
    calls = calls_of(zoo.ChangesInputInPlace())
    assert calls["blocks.0"][0].inputs[0].changed
    assert not calls["blocks.0.up"][0].inputs[0].changed


def test_a_value_changed_between_two_calls_is_another_value() -> None:
    class Between(zoo.Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            x.add_(1)
            return self.blocks[1](x)

    calls = calls_of(Between(zoo.Mlp(), zoo.Mlp()))
    assert calls["blocks.0"][0].output != calls["blocks.1"][0].inputs[0].key


def test_module_that_does_not_return_one_tensor_has_no_output() -> None:
    assert calls_of(zoo.ReturnsTuples())["blocks.0"][0].output is None


@pytest.mark.parametrize("kind", [zoo.PreNormBlocks, zoo.PostActivationBatchNorm, zoo.TwoAdditionsInABlock])
def test_saved_bytes_are_what_autograd_saves(kind: type[zoo.Net]) -> None:
    model = kind().train()
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(*model.example())
    del output
    expected = sum(size for address, size in storages.items() if address not in owned)
    found = observe(model, model.example())
    assert found.saved_bytes == expected
    assert sum(c.saved_bytes for c in found.calls if c.path.count(".") == 1) <= expected
    assert sum(c.saved_bytes for c in found.calls if c.path.startswith("blocks.") and c.path.count(".") == 1) > 0


@pytest.mark.parametrize("kind", [*zoo.CONVERTIBLE, *zoo.REFUSED])
@pytest.mark.sampled(2)
def test_the_model_stays_as_it_was(kind: type[zoo.Net]) -> None:
    model = kind().eval()
    model.register_forward_hook(lambda *_: pytest.fail("the user's hook fired"))
    next(model.children()).register_forward_pre_hook(lambda *_: pytest.fail("the user's hook fired"))
    x = model.example()
    kept = [t.clone() for t in x]
    with Unchanged(model):
        observe(model, x)
        trace(model, x)
    assert all(torch.equal(a, b) for a, b in zip(x, kept, strict=True))


def test_copy_without_data_shares_what_the_model_shares() -> None:
    model = zoo.SharedModuleInBlock().eval()
    bare = meta_copy(model)
    assert all(p.is_meta for p in bare.parameters())
    assert bare.blocks[0].norm.weight is bare.blocks[3].norm.weight
    assert [n for n, _ in bare.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(m.training for m in bare.modules())


def test_runs_for_real_where_it_does_not_run_without_data() -> None:
    calls = calls_of(zoo.BranchesOnData())
    assert "blocks.3" in calls


def test_a_real_run_leaves_buffers_and_random_numbers_alone() -> None:
    class Real(zoo.PostActivationBatchNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x) if x.sum() > -1e9 else x)

    model = Real()
    with Unchanged(model):
        observe(model, [torch.ones(zoo.IMAGE)])


def test_example_that_does_not_fit_is_refused_with_its_shape() -> None:
    with pytest.raises(
        RefusalError, match=r"PreNormBlocks does not run on an example of shape \[\(2, 5, 7\)\]: .*example="
    ):
        observe(zoo.PreNormBlocks(), [torch.zeros(2, 5, 7)])


def test_graph_has_the_calls_of_all_modules() -> None:
    traced = trace(zoo.PreNormBlocks(), [torch.zeros(zoo.TOKENS)])
    assert traced.failure is None
    assert set(traced.calls) >= {"blocks.0", "blocks.3", "blocks.0.up"}
    assert traced.calls["blocks.1"][0].args[0] is traced.calls["blocks.0"][0].output
    assert isinstance(traced.calls[""][0].output, fx.Node)


def test_arguments_with_defaults_are_fixed_unless_they_are_given() -> None:
    class Optional(zoo.PreNormBlocks):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    assert trace(Optional(), [torch.zeros(zoo.TOKENS)]).failure is None
    given = trace(Optional(), [torch.zeros(zoo.TOKENS)] * 2)
    assert given.graph is not None
    assert len([n for n in given.graph.nodes if n.op == "placeholder"]) == 2
    alone = trace(Optional(), [torch.zeros(zoo.TOKENS)])
    assert alone.graph is not None
    assert not [n for n in alone.graph.nodes if n.op == "call_function" and n.target is torch.mul]


def test_failure_to_trace_is_told() -> None:
    model = zoo.BranchesOnData()
    traced = trace(model, model.example())
    assert traced.graph is None
    assert traced.failure is not None
    assert traced.failure.startswith(
        "TraceError: symbolically traced variables cannot be used as inputs to control flow"
    )
