"""What looks like a block and is in no stage → a refusal with path, reason and remedy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn
from torch.fx import GraphModule

from revify.planning.blocks import ResidualBlock
from revify.plans import Refusal
from revify.reading.additions import count_additions
from revify.reading.chains import FEWEST
from revify.reading.observing import Call, Observation
from revify.reading.roles import concatenates
from revify.reading.tracing import Trace

KEEP_BLOCKS = (
    "it is, or holds, a torch.fx.GraphModule, in which the blocks have come apart: extract from the converted model instead, "
    "create_feature_extractor(revify.convert(model, x), nodes), with nodes outside of the blocks, or keep the blocks whole, "
    'create_feature_extractor(model, nodes, tracer_kwargs={"leaf_modules": [the class of the blocks]})'
)
NAMING = 'convert(..., stages=["…"]), where it keeps the shape of what it is given'


def find_refusals(
    observation: Observation,
    graph: Trace,
    blocks: tuple[ResidualBlock, ...],
    staged: Collection[str],
    modules: dict[str, nn.Module],
) -> tuple[Refusal, ...]:
    """A reason for every module that looks like a block, a child of a sequence with modules of its own, and is in no stage."""
    inside = set(staged)
    above = {parent for path in inside for parent in parents(path)}
    residual = {b.call.path: b for b in blocks}
    counts: dict[str, int] = {}
    for call in observation.calls:
        counts[call.path] = counts.get(call.path, 0) + 1
    additions = count_additions(graph)
    refused: dict[str, Refusal] = {}
    for call in observation.calls:
        reused = counts[call.path] > 1 and any(i.shape == call.shape for i in call.inputs)
        candidate = (reused or in_sequence(call, modules)) and list(modules[call.path].children())
        looks_like_block = call.path in residual or candidate
        covered = call.path in inside | above or any(parent in inside | set(refused) for parent in parents(call.path))
        if looks_like_block and not covered and call.saved_bytes and call.path not in refused:
            refused[call.path] = _explain(call, counts, residual.get(call.path), graph, additions)
    if not inside and not refused:
        nothing = "no module adds its input to its output: there is no residual block in it"
        refused[""] = Refusal("", nothing, instead(modules.values()))
    return tuple(refused.values())


def instead(modules: Iterable[nn.Module]) -> str:
    """What to do with a model of these modules that has no stage."""
    return KEEP_BLOCKS if any(isinstance(module, GraphModule) for module in modules) else "use gradient checkpointing"


def in_sequence(call: Call, modules: dict[str, nn.Module]) -> bool:
    """Whether a called module stands beside others in a list."""
    parent = modules[call.path.rpartition(".")[0]]
    return isinstance(parent, nn.Sequential | nn.ModuleList) and len(parent) > 1


def _explain(
    call: Call, counts: Mapping[str, int], block: ResidualBlock | None, graph: Trace, additions: Mapping[str, int]
) -> Refusal:
    """Why a module that looks like a block is not part of a stage."""
    if counts[call.path] > 1:
        reason = f"is called {counts[call.path]} times in one forward pass"
        return Refusal(call.path, reason, "give each call a module of its own")
    if call.output is None and block is None:
        reason = "does not return a tensor, or several none of which is its input with something added"
        return Refusal(call.path, reason, "checkpoint it")
    if call.dtype is not None and call.dtype.is_complex:
        return Refusal(call.path, "its stream is of complex numbers, which have no grid", "checkpoint it")
    if any(i.changed for i in call.inputs):
        reason = "changes its input in place, which the backward would have to reconstruct"
        return Refusal(call.path, reason, "make its first operation out of place (activations: inplace=False)")
    if block is not None and additions.get(call.path, 0) >= FEWEST:
        reason = (
            f"adds {additions[call.path]} times in its own forward, which cannot be cut into steps: torch.fx does not trace "
            "it, it asks for its mode, or what it adds has several shapes"
        )
        return Refusal(call.path, reason, f"name what it calls: {NAMING}")
    if block is not None:
        reason = "is a residual block, but neither the module before it nor the one after it continues its stream"
        return Refusal(call.path, reason, 'convert(..., transitions="checkpoint") where it lies between stages')
    if _concatenated(call, graph):
        reason = "its output is concatenated with its input, not added to it: the width grows, there is no stream"
        return Refusal(call.path, reason, "checkpoint it")
    shapes = [i.shape for i in call.inputs]
    if shapes and call.shape not in shapes:
        reason = f"changes the shape ({_sizes(shapes[0])} to {_sizes(call.shape)}): a transition"
        return Refusal(call.path, reason, 'convert(..., transitions="checkpoint") where it lies between stages')
    caller = next((parent for parent in reversed(parents(call.path)) if counts.get(parent)), "")
    if additions.get(caller, 0):
        reason = "does not add to its input: what it returns is a branch, which its caller may add"
        return Refusal(call.path, reason, f"name it: {NAMING}")
    reason = "no path of additions leads from its input to its output: it is no residual block"
    return Refusal(call.path, reason, f"name it: {NAMING}, or checkpoint it")


def _concatenated(call: Call, graph: Trace) -> bool:
    """Whether what the module returns is what it was given with something beside it."""
    calls = graph.calls.get(call.path, [])
    only = calls[0] if len(calls) == 1 else None
    return only is not None and any(
        concatenates(only.given(i.argument), only.output, graph.modules) for i in call.inputs
    )


def _sizes(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape[1:])) or "a scalar"


def parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]
