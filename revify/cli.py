"""`revify plan | convert | measure | finetune MODEL`: the package from the command line.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 an error that is told
in one paragraph, 2 wrong usage, 130 interrupted. What needs torch is imported by the commands, so that help
comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from revify.errors import RevifyError
from revify.finetuning.recipe import Recipe
from revify.methods import Options
from revify.options import make_parser
from revify.words import CALIBRATED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from revify.finetuning.timm_models import Created
    from revify.plans import Plan

_EXTRAS = frozenset({"accelerate", "sklearn", "matplotlib"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes them from the command line.

    Returns:
        The exit code.
    """
    options = make_parser().parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
        return 0
    except RevifyError as error:
        return _complain(str(error), 1)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return _complain(f"this needs {error.name}, which is not installed: pip install 'revify[finetune]'.", 1)
    except KeyboardInterrupt:
        return _complain("interrupted. A fine-tuning run goes on from its last whole epoch with --resume.", 130)


def _complain(text: str, code: int) -> int:
    print(f"revify: error: {' '.join(text.split())}", file=sys.stderr)
    return code


# Commands


def _plan(options: argparse.Namespace) -> None:
    import torch

    from revify.conversion import plan

    with _status(options, "analysing"):
        created = _create(options)
        example = torch.zeros(options.batch_size, *created.input_size, device="meta")
        found = plan(created.model, example, **_conversion(options))
    print(found)
    if options.json:
        _write(options.json, found.to_json())


def _convert(options: argparse.Namespace) -> None:
    import torch

    from revify.conversion import convert
    from revify.finetuning.agreement import agreement, calibration_images
    from revify.finetuning.data import open_data
    from revify.saving import save

    with _status(options, "converting"):
        created = _create(options)
        size = created.input_size
        example = torch.zeros(2, *size, device="meta")
        given, found = _conversion(options), None
        if options.calibrate:
            data = open_data(options.calibrate, channels=size[0])
            given["calibration"] = calibration_images(data, options.images, created.model, size)
        model = convert(created.model, example, **given)
        if options.calibrate:
            found = agreement(model, created.model, data, size)
        save(model, options.out, created.record)
    print(model.revify_plan)
    if found:
        print(f"\n{found}")
    plan: Plan = model.revify_plan  # type: ignore[assignment]  # nn.Module promises a Tensor or a Module
    readers = "revify.load reads it" + ("" if plan.is_split else ", and so does timm")
    if any(stage.predictor in CALIBRATED for stage in plan.stages):
        readers = "timm reads it; revify.load also reads the fitted predictors, which lie in a file beside it"
    print(f"\nwritten: {options.out} ({options.out.stat().st_size / 1e6:.1f} MB); {readers}")


def _measure(options: argparse.Namespace) -> None:
    import torch

    from revify.conversion import plan
    from revify.measuring.measuring import measure

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision]
    with _status(options, "measuring", "plain, checkpointed and converted, in turns"):
        created = _create(options)
        model = _place(created.model, device)
        batch = torch.randn(options.batch_size, *created.input_size, device=device)
        found = plan(model, batch, **_conversion(options))
        report = measure(model, batch, plan=found, autocast=precision, repeats=options.repeats)
    print(report)
    if options.json:
        _write(options.json, report.to_json())


def _finetune(options: argparse.Namespace) -> None:
    from revify.finetuning.progress import ConsoleProgress
    from revify.finetuning.run import finetune

    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    given["model_kwargs"] = dict(options.model_kwargs)
    given.setdefault("out", Path("runs") / options.model)
    if "bits_schedule" in given:
        given["bits_schedule"] = tuple(given["bits_schedule"])
    if "scale" in given:
        given["scale"] = tuple(given["scale"])
    finetune(Recipe(**given), ConsoleProgress(Console(stderr=True)))


def _create(options: argparse.Namespace) -> Created:
    from revify.finetuning.timm_models import Architecture, create

    created = create(
        Architecture(
            options.model,
            dict(options.model_kwargs),
            options.img_size,
            options.num_classes,
            bool(options.pretrained),
            options.checkpoint,
        )
    )
    if created.remark:
        print(created.remark, file=sys.stderr)
    return created


def _conversion(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `revify.convert` that were given."""
    given = {name: getattr(options, name, None) for name in Options.__annotations__}
    if given["coupling"] is not None:
        given["coupling"] = _formula(given["coupling"])
    return {name: value for name, value in given.items() if value is not None}


def _formula(name: str) -> Any:  # a coupling
    """A coupling of revify, or module:function, which is imported: it is the user's own word, not that of a file."""
    from revify.couplings.parts import find_coupling

    module, colon, function = name.partition(":")
    if not colon:
        return find_coupling(name)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RevifyError(f"the coupling {name} cannot be imported ({error}): give module:function.") from error


def _place(model: nn.Module, device: str | torch.device) -> nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise RevifyError(f"the device {device!r} cannot be used here: {error}") from error


def _status(options: argparse.Namespace, doing: str, how: str = "") -> Any:  # rich: a context manager
    return Console(stderr=True).status(f"{doing} {options.model}{': ' + how if how else ''} …")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RevifyError(f"{path} cannot be written: {error.strerror}.") from error


_COMMANDS = {"plan": _plan, "convert": _convert, "measure": _measure, "finetune": _finetune}
