"""Networks of other packages: planned, converted, checked to the bit, and their peak counted against checkpointing.

One row for each network of `networks`. The rival is per-block checkpointing of the blocks that a person would name, each
with torch.utils.checkpoint. The gradients are those of the converted model under ordinary autograd, bit for bit, or
the row says DIFFERENT. Bytes are counted on the CPU, where they repeat exactly; no times.

The packages (spandrel, vit-pytorch, …) are not needed for anything else: install them with `pip install --no-deps
--target DIR …` and put DIR on PYTHONPATH. A package that is not there is said to be missing.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import Results
from more_networks import MORE
from networks import NETWORKS, Example, Network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revify
from revify.measuring.measuring import mean_square
from revify.measuring.memory import count_memory
from revify.tables import group_reasons

COLUMNS = {
    "package": 15, "network": 26, "stages": 20, "plain MB": 8, "ckpt MB": 8, "ours MB": 8, "to ckpt": 7, "4 bits": 7,
    "predicted": 9, "gradients": 10, "plan CPU s": 10, "what": 60,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks or packages, all by default")
    parser.add_argument("--into", default="architectures", help="the results' name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.into, COLUMNS)
    ratios, fewer, predicted, seconds = [], [], [], []
    for network in (*NETWORKS, *MORE):
        if options.names and not {network.name, network.package} & set(options.names):
            continue
        try:
            found = row(network)
        except Exception as error:  # of a network of others, or of revify: the row says which, and the others follow
            said = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            found = ("", "", "", "", "", "", "", "ERROR", "", said)
        results.row(network.package, network.name, *found)
        if isinstance(found[4], float):
            ratios.append(found[4])
            fewer.append(found[5])
            predicted.append(found[6])
        seconds += [found[8]] if isinstance(found[8], float) else []
        results.failed += found[7] in ("DIFFERENT", "ERROR")
    if ratios:
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        results.say(f"\n{len(ratios)} of {len(results.rows)} converted")
        results.say(f"peak to checkpointing of the named blocks: geometric mean {mean:.3f}, most {max(ratios):.3f}")
        results.say(
            f"the same at 4 bits: {math.exp(statistics.fmean(map(math.log, fewer))):.3f}, most {max(fewer):.3f}"
        )
        results.say(f"CPU seconds to plan: median {statistics.median(seconds):.2f}, most {max(seconds):.1f}")
        middle = statistics.median(predicted)
        results.say(f"predicted to measured peak: median {middle:.3f}, {min(predicted):.2f} to {max(predicted):.2f}")
    return results.write()


def row(network: Network) -> tuple[Any, ...]:
    """What was found out about one network, in the order of the columns."""
    torch.manual_seed(0)
    try:
        plain, example = network.make()
    except ImportError as error:
        return ("", "", "", "", "", "", "", "missing", "", str(error))
    plain.train()
    rival, named = checkpointed(plain, network.blocks)
    began = time.process_time()
    try:
        plan = revify.plan(plain, example)
    except revify.RevifyError as error:
        return ("", "", "", "", "", "", "", "refused", "", str(error).replace("\n", " ")[:300])
    seconds = round(time.process_time() - began, 2)
    stages = "-".join(str(stage.length) for stage in plan.stages)
    what = f"{named} blocks named; {kinds(plan)}"
    plain_peak, rival_peak = peak(plain, example), peak(rival, example)
    shown = [round(plain_peak / 1e6, 3), round(rival_peak / 1e6, 3)]
    if not plan.stages:
        reasons = "; ".join(f"{paths}: {reason}" for reason, paths in group_reasons(plan.refusals).items())
        return ("", *shown, "", "", "", "", "refused", seconds, f"{what}; {reasons}"[:400])
    converted = revify.convert(plain, plan=plan)
    same = gradients_are_equal(converted, example)
    ours = peak(converted, example)
    fewer = replace(plan, stages=tuple(stage.with_bits(4) for stage in plan.stages))
    at_4_bits = peak(revify.convert(plain, plan=fewer), example)
    ratios = round(ours / rival_peak, 3), round(at_4_bits / rival_peak, 3), round(plan.predicted_bytes / ours, 3)
    return (stages, *shown, round(ours / 1e6, 3), *ratios, "same" if same else "DIFFERENT", seconds, what)


def kinds(plan: revify.Plan) -> str:
    """The classes of the stages' blocks."""
    return ", ".join(dict.fromkeys(block.kind for stage in plan.stages for block in stage.blocks))


def checkpointed(model: nn.Module, patterns: tuple[str, ...]) -> tuple[nn.Module, int]:
    """A copy that checkpoints the innermost modules that match, and how many they are."""
    copied = copy.deepcopy(model)
    paths = [path for path, _ in copied.named_modules() if any(re.fullmatch(pattern, path) for pattern in patterns)]
    blocks = [path for path in paths if not any(other.startswith(path + ".") for other in paths)]
    for path in blocks:
        module = copied.get_submodule(path)
        if any(True for _ in module.parameters()):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
    return copied, len(blocks)


def peak(model: nn.Module, example: Example) -> int:
    """The most that one training step allocates, once the gradients are there."""

    def forward() -> Tensor:
        return loss_of(model, example)

    torch.manual_seed(1)
    torch.autograd.backward(forward())
    return count_memory(forward, torch.device("cpu")).peak


def loss_of(model: nn.Module, example: Example) -> Tensor:
    """A number that every output goes into."""
    return mean_square(model(**example) if isinstance(example, dict) else model(*example))


def gradients_are_equal(model: nn.Module, example: Example) -> bool:
    """Whether the memory-free backward gives the same bits as ordinary autograd on the same model."""
    found = []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for plain in (True, False):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(1)
        if plain:
            with revify.plain_backward():
                output = loss_of(model, example)
            output.backward()
        else:
            output = loss_of(model, example)
            output.backward()
        found.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


if __name__ == "__main__":
    sys.exit(main())
