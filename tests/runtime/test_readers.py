"""Who reads or copies a converted model (torch.fx, jit, export and func, nn.DataParallel): each works, or says why not."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asserts import assert_same, both_ways, converted, gradients, inputs_of, run
from torch import Tensor, nn
from torch.func import functional_call

import revify

KINDS = [zoo.PreNormBlocks, zoo.PostActivationBatchNorm, zoo.TwoStages, zoo.ReturnsTuples, zoo.SideInputsWithGradient]
OPTIONS: list[dict[str, Any]] = [
    {"bits": 2},
    {"bits": 0, "unit": "branch"},
    {"streams": "split"},
    {"step": "coded"},
    {"step": "coded", "unit": "branch"},
]


@pytest.fixture
def model_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    kind, options = request.param
    model = converted(kind, **options)
    return model, inputs_of(model)


every_kind = pytest.mark.parametrize(
    "model_and_input",
    [(kind, options) for kind in KINDS[:3] for options in OPTIONS[:3]]
    + [(kind, OPTIONS[0]) for kind in KINDS[3:]]
    + [(zoo.TwoStages, options) for options in OPTIONS[3:]],
    indirect=True,
)
every_step = pytest.mark.parametrize(
    "model_and_input", [(zoo.PreNormBlocks, options) for options in OPTIONS], indirect=True
)


@every_kind
def test_torch_fx_sees_leaves_and_its_graph_trains_to_the_bit(model_and_input: Any) -> None:
    model, x = model_and_input
    graph = torch.fx.symbolic_trace(model)
    expected = run(model, x, plain=True)
    assert_same(run(graph, x), expected)
    paths = {block.path for stage in model.revify_plan.stages for block in stage.blocks}
    assert paths <= {node.target for node in graph.graph.nodes if node.op == "call_module"}


@every_kind
@pytest.mark.sampled(3)
def test_exports_in_eval_mode_give_the_same_values(model_and_input: Any) -> None:
    model, x = model_and_input
    model.eval()
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            expected = model(*x)
            assert torch.equal(torch.export.export(model, x, strict=False).module()(*x), expected)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(model, x)(*x), expected)


@every_step
def test_a_strict_export_of_plain_blocks_works_and_that_of_others_ends_in_a_sentence(model_and_input: Any) -> None:
    model, x = model_and_input
    for training in (False, True):
        model.train(training)
        if not training and {stage.step for stage in model.revify_plan.stages} == {"coded"}:
            assert torch.equal(torch.export.export(model, x, strict=True).module()(*x), model(*x))
        else:
            said = (
                r"cannot read this block .* Call torch.export\(strict=False\), or export|\(RefusalError\)"  # torch 2.8
            )
            with pytest.raises(Exception, match=said):
                torch.export.export(model, x, strict=True)


@every_step
def test_exports_in_training_mode_have_what_training_does(model_and_input: Any) -> None:
    model, x = model_and_input
    for part in model.modules():
        part.train(not isinstance(part, nn.Dropout))
    with torch.no_grad():
        graphs = torch.export.export(model, x, strict=False).module(), torch.jit.trace(model, x, check_trace=False)
        expected = model(*x)
        assert all(torch.equal(graph(*x), expected) for graph in graphs)


@every_step
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_gives_the_same_values_or_a_sentence(model_and_input: Any, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = model_and_input
    model.eval()
    path = tmp_path / "model.onnx"
    if not dynamo and {stage.step for stage in model.revify_plan.stages} != {"coded"}:
        with pytest.raises(
            revify.RefusalError, match=r"Call torch.onnx.export\(dynamo=True\), or export the plain model"
        ):
            torch.onnx.export(model, x, path, dynamo=False)
        return
    torch.onnx.export(model, x, path, dynamo=dynamo)
    session = onnxruntime.InferenceSession(path)
    given = {wanted.name: value.numpy() for wanted, value in zip(session.get_inputs(), x, strict=True)}
    (found,) = session.run(None, given)
    torch.testing.assert_close(torch.from_numpy(found), model(*x).detach(), rtol=1e-5, atol=1e-5)  # other kernels


@every_kind
def test_torch_jit_script_ends_in_a_sentence(model_and_input: Any) -> None:
    model, _ = model_and_input
    with pytest.raises(
        revify.RefusalError, match=r"Script the plain model, torch.jit.script\(revify.revert\(model\)\)"
    ):
        torch.jit.script(model)


@every_kind
def test_transforms_of_torch_func_work_under_ordinary_autograd(model_and_input: Any) -> None:
    model, (x, *_) = model_and_input
    model.eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, weights, (sample[None],)).square().mean()

    def per_sample() -> dict[str, Tensor]:
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)

    with pytest.raises(revify.StreamError, match=r"with revify.plain_backward\(\)"):
        per_sample()
    with revify.plain_backward():
        found = per_sample()
    for number, sample in enumerate(x):
        model.zero_grad()
        with revify.plain_backward():
            model(sample[None]).square().mean().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(
                    found[name][number], p.grad, rtol=1e-3, atol=1e-5
                )  # other kernels under vmap
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(lambda s: model(s[None])[0])(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_every_transform_of_torch_func_ends_in_a_sentence(transform: Callable[..., Any]) -> None:
    model = converted(zoo.PreNormBlocks)
    with pytest.raises(revify.StreamError, match=r"transforms of torch\.func"):
        transform(lambda a: model(a).sum())(*inputs_of(model))


@pytest.mark.parametrize("options", [{"bits": 1}, {"step": "coded"}])
def test_a_whole_step_compiled(options: dict[str, Any]) -> None:
    model = converted(zoo.DropoutAndDropPath, **options)
    model.eval()
    x = inputs_of(model)

    def step() -> Tensor:
        loss = model(*x).square().sum()
        loss.backward()
        return loss

    with revify.plain_backward():
        step()
    expected = gradients(model)
    model.zero_grad()
    torch.compile(step, backend="eager")()
    assert_same(gradients(model), expected)


# nn.DataParallel


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """The second replica of a model, made on the CPU."""
    module = sys.modules["torch.nn.parallel.replicate"]
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return lambda model: module.replicate(model, [0, 1])[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [*OPTIONS, {"calibrated": True}])
def test_a_replica_computes_with_its_own_weights(
    kind: type[zoo.Net], options: dict[str, Any], replicate: Callable[[nn.Module], nn.Module]
) -> None:
    if kind in KINDS[3:] and options not in OPTIONS[:2]:
        pytest.skip("these are for blocks with one result, called with the stream alone")
    if "calibrated" in options:
        model = converted(kind)
        model = revify.calibrate(model, *inputs_of(model), predictor="linear", bits=1)
    else:
        model = converted(kind, **options)
    model.eval()
    x = inputs_of(model)
    expected = {name: g for name, g in run(model, x, plain=True).items() if name.startswith("grad")}
    model.zero_grad(set_to_none=True)
    for plain in (False, True):
        with revify.plain_backward() if plain else contextlib.nullcontext():
            replica = replicate(model)
        leaves = [p for part in replica.modules() for p in vars(part).get("_former_parameters", {}).values()]
        output = replica(*x)  # out of the context: a replica remembers
        given = torch.autograd.grad(output.sum(), leaves, allow_unused=True, retain_graph=True)
        assert sum(g is not None for g in given) == len(expected)
        (output * torch.linspace(-1, 2, output.numel()).view(output.shape)).sum().backward()
        assert_same(gradients(model), expected)
        model.zero_grad(set_to_none=True)


def test_plain_backward_reaches_the_threads_of_replicas(replicate: Callable[[nn.Module], nn.Module]) -> None:
    model = converted(zoo.PreNormBlocks)
    x = inputs_of(model)
    found: list[int] = []

    def work(replica: nn.Module) -> None:
        found.append(len(saved_by(lambda: replica(*x))))

    with revify.plain_backward():
        replica, expected = replicate(model), len(saved_by(lambda: model(*x)))
        thread = threading.Thread(target=work, args=(replica,))
        thread.start()
        thread.join()
    assert found == [expected]


def saved_by(call: Callable[[], object]) -> list[Tensor]:
    """What autograd is given to save, besides revify's own placeholders."""
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        call()
    return seen


# Modules that are replaced after conversion


class FrozenNorm(nn.Module):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(norm.weight.detach()), nn.Parameter(norm.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def replace_norms(model: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, make(child))
    return model


@pytest.mark.parametrize(
    "make", [FrozenNorm, lambda norm: nn.GroupNorm(1, norm.num_features), lambda norm: nn.Identity(), nn.Sequential]
)
@pytest.mark.parametrize("kind", [zoo.LayersInARow, zoo.TwoStages, zoo.PostActivationBatchNorm])
@pytest.mark.parametrize("options", [*OPTIONS, {"transitions": "keep"}])
@pytest.mark.sampled(6)
def test_norms_replaced_after_conversion(
    kind: type[zoo.Net], options: dict[str, Any], make: Callable[[nn.Module], nn.Module]
) -> None:
    model = replace_norms(converted(kind, **options), make)
    x = inputs_of(model)
    expected = run(model, x, plain=True)
    assert_same(run(model, x), expected)


@pytest.mark.parametrize("number", range(4))
def test_a_block_replaced_after_conversion_is_named(number: int) -> None:
    model = converted(zoo.PreNormBlocks)
    model.blocks[number] = zoo.Mlp()
    x = inputs_of(model)
    if number == 3:
        assert_same(run(model, x), run(model, x, plain=True))
        return
    with pytest.raises(revify.StreamError, match=rf"or blocks.{number} was replaced by another module after the conv"):
        model(*x)


# torchvision's create_feature_extractor, in either order


@pytest.mark.parametrize("step", ["coded", "recurrence"])
@pytest.mark.parametrize("order", ["convert, extract", "extract, convert", "extract whole blocks, convert"])
@pytest.mark.sampled(2)
def test_feature_extractors_train_to_the_bit(step: str, order: str) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = pytest.importorskip("torchvision.models")
    x, nodes = torch.randn(2, 3, 32, 32), ["conv1", "layer1", "layer3"]
    torch.manual_seed(0)
    net = models.ResNet(models.resnet.BasicBlock, [3, 3, 3, 2])
    if order == "convert, extract":
        model = extraction.create_feature_extractor(revify.convert(net, x, step=step), nodes)
    else:
        tracer = {"leaf_modules": [models.resnet.BasicBlock]} if "whole" in order else {}
        model = revify.convert(extraction.create_feature_extractor(net, nodes, tracer_kwargs=tracer), x, step=step)
    both_ways(model, lambda: sum(value.square().sum() for value in model(x).values()).backward())


def test_an_extractor_without_a_stage_says_what_to_pass() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = pytest.importorskip("torchvision.models")
    x, net = torch.randn(2, 3, 32, 32), models.resnet18()
    extractor = extraction.create_feature_extractor(net, ["layer4"])
    with pytest.raises(revify.RefusalError, match=r"revify\.convert\(model, x\), nodes\).*leaf_modules"):
        revify.convert(extractor, x)
    assert "leaf_modules" in str(revify.plan(extractor, x).refusals[0].remedy)
    kept = extraction.create_feature_extractor(
        net, ["layer4"], tracer_kwargs={"leaf_modules": [models.resnet.BasicBlock]}
    )
    assert revify.plan(kept, x).stages
