"""What revify relies upon in torch (and in Accelerate) without its being public: every such name is in a table here, with
a test that says what must hold. Where torch changes one of them, this is the file that fails."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import Variable
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import revify
from revify.runtime.settings import OLDER

PACKAGE = Path(revify.__file__).parent


def versions_count_changes_in_place() -> None:
    x = torch.zeros(2)
    view, before = x.view(2, 1), x._version
    view.add_(1)
    assert x._version == view._version == before + 1
    x.data.add_(1)
    assert x._version == before + 1  # not those by way of .data


def views_know_what_they_are_of() -> None:
    x = torch.zeros(2)
    assert x[:1]._base is x
    assert x._base is None


def a_storage_has_one_address() -> None:
    x = torch.zeros(2)
    assert x.untyped_storage()._cdata == x.view(2, 1).untyped_storage()._cdata
    assert x.untyped_storage()._cdata != x.clone().untyped_storage()._cdata


def backward_has_a_number_and_calls_at_its_end() -> None:
    seen: list[str] = []
    x = torch.ones(1, requires_grad=True)
    assert torch._C._current_graph_task_id() == -1

    def hook(_: torch.Tensor) -> None:
        assert torch._C._current_graph_task_id() >= 0
        Variable._execution_engine.queue_callback(lambda: seen.append("end"))
        seen.append("hook")

    y = x * 2
    y.register_hook(hook)
    x.register_hook(lambda _: seen.append("leaf"))
    y.backward()
    assert seen == ["hook", "leaf", "end"]


def modules_hold_what_is_theirs_in_dictionaries() -> None:
    module = nn.BatchNorm1d(2)
    assert list(module._parameters) == ["weight", "bias"]
    assert list(module._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(nn.Sequential(module)._modules) == ["0"]


def modules_hold_hooks_in_dictionaries() -> None:
    module = nn.Identity()
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    module.register_state_dict_pre_hook(lambda *_: None)
    module.register_state_dict_post_hook(lambda *_: None)
    module.register_load_state_dict_pre_hook(lambda *_: None)
    module.register_load_state_dict_post_hook(lambda *_: None)
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_pre_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    ):
        assert len(getattr(module, name)) == 1, name
    module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    assert list(module._forward_pre_hooks_with_kwargs) == list(module._forward_pre_hooks)[-1:]
    for name in ("_global_forward_pre_hooks", "_global_forward_hooks"):  # those for all modules
        assert isinstance(vars(nn.modules.module)[name], dict), name


def layers_of_a_kind_have_a_common_class() -> None:
    assert isinstance(nn.Conv1d(1, 1, 1), nn.modules.conv._ConvNd)
    assert isinstance(nn.ConvTranspose2d(1, 1, 1), nn.modules.conv._ConvNd)
    assert isinstance(nn.BatchNorm2d(1), nn.modules.batchnorm._NormBase)
    assert isinstance(nn.InstanceNorm2d(1), nn.modules.batchnorm._NormBase)
    assert isinstance(nn.Dropout2d(), nn.modules.dropout._DropoutNd)


def a_compiled_module_shows_it() -> None:
    module = nn.Identity()
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None


def trees_of_tensors_come_apart_and_together() -> None:
    tree = {"a": [1, (2,)], "b": None}
    leaves, spec = pytree.tree_flatten(tree)
    assert leaves == [1, 2, None]
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert pytree.tree_map(str, {"a": (1,)}) == {"a": ("1",)}


def a_function_is_hidden_from_the_compiler_without_importing_it() -> None:
    from torch._compile import _disable_dynamo

    def one() -> int:
        return 1

    assert _disable_dynamo(one)() == 1
    assert torch.compiler.disable(one)._torchdynamo_orig_callable is one


def transforms_and_traces_are_seen() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._functorch.peek_interpreter_stack() is not None)
        seen.append(torch._C._functorch.is_functorch_wrapped_tensor(x))
        return x

    look(torch.ones(1))
    torch.func.vmap(look)(torch.ones(1))
    assert seen == [False, False, True, True]
    assert torch._C._is_tracing() is False


def an_export_raises_a_flag() -> None:
    seen: list[bool] = []

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.compiler._is_exporting_flag)
            return x

    torch.export.export(Looks(), (torch.ones(1),), strict=False)
    torch.compile(Looks(), backend="eager")(torch.ones(1))
    assert set(seen[:-1]) == {True}
    assert seen[-1] is torch.compiler._is_exporting_flag is False


def precisions_are_read_and_written() -> None:
    if not hasattr(torch._C, "_get_fp32_precision_getter"):  # added after torch 2.8
        assert all(hasattr(torch._C, f"{kind}_{name}") for kind in ("_get", "_set") for name in OLDER)
        return
    now = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", now)
    assert torch._C._get_fp32_precision_getter("mkldnn", "matmul") == now


def parametrized_weights_are_cached_in_the_module() -> None:
    assert not parametrize._cache_enabled
    with parametrize.cached():
        assert parametrize._cache_enabled
    assert parametrize._cache == {}


def accelerate_has_a_state_that_can_be_reset() -> None:
    state = pytest.importorskip("accelerate.state")
    assert isinstance(state.PartialState._shared_state, dict)
    assert callable(state.AcceleratorState._reset_state)
    assert callable(state.GradientState._reset_state)


def a_mode_sees_every_operation() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: object, types: object, args: object = (), kwargs: object = None
        ) -> object:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add_(1)
    assert "aten.add_.Tensor" in seen


def operations_of_a_backward_know_those_of_the_forward() -> None:
    x = torch.ones(2, requires_grad=True)
    before = torch._C._autograd._get_sequence_nr()
    y = x.exp()
    assert before <= y.grad_fn._sequence_nr() < torch._C._autograd._get_sequence_nr()
    nodes: list[object] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            assert not function._schema.is_mutable
            if function._overloadpacket is torch.ops.aten.mul:
                nodes.append(torch._C._current_autograd_node())
            return function(*args, **(kwargs or {}))

    gradient = torch.ones(2)
    with Mode():
        y.backward(gradient)
    assert nodes == [y.grad_fn]


def attention_has_one_kernel_without_a_device() -> None:
    q = torch.empty(1, 2, 3, 4, device="meta", requires_grad=True)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = attention(q, q, q, 0.0, False, attn_mask=None, scale=None)[0]
    found.sum().backward()
    assert (found.shape, q.grad.shape) == (q.shape, q.shape)
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


RELIED_UPON: dict[str, Callable[[], None]] = {
    "_version": versions_count_changes_in_place,
    "_base": views_know_what_they_are_of,
    "_cdata": a_storage_has_one_address,
    "_current_graph_task_id": backward_has_a_number_and_calls_at_its_end,
    "_execution_engine": backward_has_a_number_and_calls_at_its_end,
    "_parameters": modules_hold_what_is_theirs_in_dictionaries,
    "_buffers": modules_hold_what_is_theirs_in_dictionaries,
    "_modules": modules_hold_what_is_theirs_in_dictionaries,
    "_load_state_dict_pre_hooks": modules_hold_hooks_in_dictionaries,
    "_forward_pre_hooks": modules_hold_hooks_in_dictionaries,
    "_forward_pre_hooks_with_kwargs": modules_hold_hooks_in_dictionaries,
    "_ConvNd": layers_of_a_kind_have_a_common_class,
    "_NormBase": layers_of_a_kind_have_a_common_class,
    "_DropoutNd": layers_of_a_kind_have_a_common_class,
    "_compiled_call_impl": a_compiled_module_shows_it,
    "_pytree": trees_of_tensors_come_apart_and_together,
    "_python_dispatch": a_mode_sees_every_operation,
    "_disable_dynamo": a_function_is_hidden_from_the_compiler_without_importing_it,
    "_torchdynamo_orig_callable": a_function_is_hidden_from_the_compiler_without_importing_it,
    "_functorch": transforms_and_traces_are_seen,
    "_is_tracing": transforms_and_traces_are_seen,
    "_get_fp32_precision_getter": precisions_are_read_and_written,
    "_set_fp32_precision_setter": precisions_are_read_and_written,
    "_is_exporting_flag": an_export_raises_a_flag,
    "_cache": parametrized_weights_are_cached_in_the_module,
    "_cache_enabled": parametrized_weights_are_cached_in_the_module,
    "_shared_state": accelerate_has_a_state_that_can_be_reset,
    **dict.fromkeys(
        ("_autograd", "_get_sequence_nr", "_sequence_nr", "_current_autograd_node", "_schema", "_overloadpacket"),
        operations_of_a_backward_know_those_of_the_forward,
    ),
    "_scaled_dot_product_flash_attention_for_cpu": attention_has_one_kernel_without_a_device,
    "_scaled_dot_product_flash_attention_for_cpu_backward": attention_has_one_kernel_without_a_device,
    "_reset_state": accelerate_has_a_state_that_can_be_reset,
}
PACKAGES = {"_C", "_compile"}  # private packages of torch, whose names are in the table
OTHERS = {  # of Python's, and methods that a class of torch's is asked to have
    "_getframe",
    "_value_",
    "_ArgumentGroup",
    "_replicate_for_data_parallel",
}


@pytest.mark.parametrize("check", dict.fromkeys(RELIED_UPON.values()), ids=lambda check: check.__name__)
def test_what_is_relied_upon_holds(check: Callable[[], None]) -> None:
    check()


def test_every_private_name_of_another_package_is_in_the_table() -> None:
    for path in PACKAGE.rglob("*.py"):
        beyond = private_names(ast.parse(path.read_text(encoding="utf-8"))) - RELIED_UPON.keys() - PACKAGES - OTHERS
        assert not beyond, (
            f"{path.relative_to(PACKAGE)} uses {sorted(beyond)}: say in the table here what it relies upon"
        )


def private_names(tree: ast.Module) -> set[str]:
    """Names that begin with one underscore, and that the file does not define itself."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_of_self(node):
            found.add(node.attr)
        elif isinstance(node, ast.Attribute):
            own.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("revify"):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in found - own if name.startswith("_") and not name.startswith("__")}


def is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
