"""The command line → an argparse namespace: every option of the four commands, with its help."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from revify.finetuning.recipe import PRECISIONS, SCHEDULES, Recipe
from revify.methods import Method, Options
from revify.option_fields import add_field, describe

_EXAMPLES = {
    "": """
examples:
  revify plan vit_small_patch16_224
  revify convert vit_small_patch16_224 --pretrained --out vit.safetensors
  revify measure vit_tiny_patch16_224 --batch-size 8 --model-kwargs depth=24
  revify finetune xcit_nano_12_p8_224 --img-size 32 --compare
""",
    "plan": """
examples:
  revify plan resnet50
  revify plan swin_tiny_patch4_window7_224 --transitions keep --json plan.json
""",
    "convert": """
examples:
  revify convert vit_small_patch16_224 --pretrained --out vit.safetensors
  revify convert vit_tiny_patch16_224 --checkpoint mine.safetensors --bits 2 --out vit.safetensors
then, in Python:
  model = revify.load("vit.safetensors")
""",
    "measure": """
examples:
  revify measure vit_tiny_patch16_224 --batch-size 8
  revify measure vit_tiny_patch16_224 --model-kwargs depth=48 --mixed-precision bf16 --bits 0
""",
    "finetune": """
examples:
  revify finetune xcit_nano_12_p8_224 --img-size 32 --compare
  revify finetune vit_small_patch16_224 --pretrained --data flowers/ --out runs/flowers --mixed-precision bf16
  revify finetune vit_small_patch16_224 --pretrained --data flowers/ --out runs/flowers --mixed-precision bf16
  --resume
on several devices:
  accelerate launch -m revify finetune vit_small_patch16_224 --data flowers/
  torchrun --nproc-per-node 2 -m revify finetune vit_small_patch16_224 --data flowers/
""",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of `revify`: `command` is the command's name; an option without a default is None."""
    parser = _Parser(
        prog="revify",
        description="Turn a timm model into a reversible one; its training memory does not grow with depth.",
        epilog=_EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, add_options) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=name)
        _add_model(sub)
        add_options(sub)
    return parser


_METHOD = describe(Method)
_RECIPE = describe(Recipe)
_CONVERSION = tuple(name for name in Options.__annotations__ if name in _RECIPE)  # a fine-tuning run has them, too
_ELSE = tuple(name for name in Options.__annotations__ if name not in _RECIPE)

_FINETUNING = {
    "run": (
        "data",
        "out",
        "calibrate",
        "bits_schedule",
        "resume",
        "compare",
        "epochs",
        "batch_size",
        "grad_accum",
        "mixed_precision",
        "workers",
        "seed",
    ),
    "learning": (
        "opt",
        "lr",
        "weight_decay",
        "layer_decay",
        "sched",
        "warmup_epochs",
        "min_lr",
        "clip_grad",
        "smoothing",
    ),
    "augmentation": (
        "mixup",
        "cutmix",
        "reprob",
        "auto_augment",
        "color_jitter",
        "hflip",
        "scale",
        "crop_pct",
    ),
}


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name of a timm model, such as vit_tiny_patch16_224")
    group = parser.add_argument_group("model")
    for name in ("img_size", "num_classes", "pretrained", "checkpoint"):
        add_field(group, _RECIPE[name])
    more = {"type": _keyword, "nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"}
    add_field(group, _RECIPE["model_kwargs"], **more)
    _add_method(parser, "conversion", _CONVERSION)


def _add_method(parser: argparse.ArgumentParser, title: str, names: Sequence[str]) -> None:
    group = parser.add_argument_group(title)
    for name in names:
        add_field(group, _METHOD[name], **({"nargs": "+"} if name == "stages" else {}))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_method(parser, "other functions", _ELSE)
    parser.add_argument("--batch-size", type=_positive, default=2, metavar="N", help="of the example (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan to a file, too")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_method(parser, "other functions", _ELSE)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--calibrate",
        metavar="DIR",
        help='fit the predictors to images of this folder, or of "digits", so that the model computes nearly the same',
    )
    parser.add_argument("--images", type=_positive, default=64, metavar="N", help="to calibrate on (default: 64)")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    _add_method(parser, "other functions", _ELSE)
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images per step (default: 8)")
    parser.add_argument(
        "--repeats", type=_positive, default=5, metavar="N", help="timed runs of each form (default: 5)"
    )
    parser.add_argument(
        "--mixed-precision", choices=PRECISIONS, default="no", help="run the forward pass under autocast"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file, too")


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    special: dict[str, dict[str, Any]] = {  # Any: arguments of add_argument
        "out": {"metavar": "DIR", "help": f"{_RECIPE['out'].text.rstrip('.')} (default: runs/MODEL)"},
        "bits_schedule": {"type": _phase, "nargs": "+", "metavar": "EPOCHS:BITS"},
        "scale": {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")},
        "sched": {"choices": SCHEDULES},
        "mixed_precision": {"choices": PRECISIONS},
    }
    for title, names in _FINETUNING.items():
        group = parser.add_argument_group(title)
        for name in names:
            add_field(group, _RECIPE[name], **special.get(name, {}))


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "plan": ("show what a conversion would do: stages, memory, what is left as it is", _add_plan),
    "convert": ("convert a model and write it to a file", _add_convert),
    "measure": ("measure one training step plain, checkpointed and converted", _add_measure),
    "finetune": ("fine-tune a converted model on images, and give the plain model back", _add_finetune),
}


class _Parser(argparse.ArgumentParser):
    """Without abbreviated options: the next option that is added must not change what a script means."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


class _Version(argparse.Action):
    """Prints the version, which is read only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from revify._version import __version__

        print(f"revify {__version__}")
        parser.exit()


def _keyword(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE (write MODEL before --model-kwargs)")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _phase(text: str) -> tuple[int, int]:
    epochs, _, bits = text.partition(":")
    if not (epochs.isdecimal() and bits.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not EPOCHS:BITS, such as 2:4")
    return int(epochs), int(bits)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)
