"""The command line → an argparse namespace: every option of the four commands, with its help."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from revify.finetuning.recipe import PRECISIONS, SCHEDULES, Recipe

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


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name of a timm model, such as vit_tiny_patch16_224")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--img-size", type=int, metavar="N", help="side of the input image in pixels (default: the model's)"
    )
    group.add_argument("--num-classes", type=int, metavar="N", help="classes (default: the data's, or the weights')")
    group.add_argument("--pretrained", action="store_true", default=None, help="start from timm's weights (network)")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="start from the weights in a timm checkpoint")
    group.add_argument(
        "--model-kwargs",
        type=_keyword,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="more arguments for timm.create_model, such as depth=24 drop_path_rate=.1",
    )
    group = parser.add_argument_group("conversion")
    group.add_argument(
        "--bits",
        type=_bits,
        metavar="B",
        help='residue bits per element and block, 0 to 8: memory for fidelity; "auto" with --calibrate',
    )
    group.add_argument(
        "--predictor",
        metavar="NAME",
        help="of the previous stream value: identity or midpoint; "
        "with --calibrate diagonal, lowrank, linear_z, linear or auto",
    )
    group.add_argument("--grid", type=int, metavar="Q", help="resolution of the stream's values, 2^-Q")
    group.add_argument(
        "--transitions", metavar="MODE", help="what lies outside of the stages: checkpoint (default) or keep"
    )
    group.add_argument(
        "--sign",
        metavar="NAME",
        help="of the coupling: positive, balanced (+ − − + over the blocks), or random in training and none in eval mode",
    )
    group.add_argument(
        "--unit", metavar="UNIT", help="what a step is: block, or branch (attention and MLP each on their own)"
    )


def _add_streams(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--streams",
        metavar="S",
        help="full, or split: the halves of the channels are the streams (RevNet); trained anew",
    )
    parser.add_argument(
        "--coupling",
        metavar="NAME",
        help="for --streams split: additive, swapped, single, affine, damped or module:function",
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_streams(parser)
    parser.add_argument("--batch-size", type=_positive, default=2, metavar="N", help="of the example (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan to a file, too")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_streams(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--calibrate",
        metavar="DIR",
        help='fit the predictors to images of this folder, or of "digits", so that the model computes nearly the same',
    )
    parser.add_argument("--images", type=_positive, default=64, metavar="N", help="to calibrate on (default: 64)")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    _add_streams(parser)
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
    run = _Group(parser, "run")
    run.add(
        "--data",
        str,
        'folder of images: DIR/train and DIR/val, or DIR, each with a folder per class; or "digits"',
    )
    run.add("--out", Path, "folder to write to (default: runs/MODEL)", default="")
    run.add("--calibrate", int, "training images to fit the predictors on first, 0 for none")
    run.add(
        "--bits-schedule",
        _phase,
        "after so many epochs go on with other bits, predictors fitted again, such as 2:4",
        nargs="+",
        metavar="EPOCHS:BITS",
        default="off",
    )
    run.flag("--resume", "continue the run in --out after its last whole epoch")
    run.flag("--compare", "train the plain and the checkpointed model too, with the same seed and budget")
    run.add("--epochs", int, "in all")
    run.add("--batch-size", int, "images per step and process")
    run.add("--grad-accum", int, "steps per update")
    run.add("--mixed-precision", str, "precision of the forward pass", choices=PRECISIONS)
    run.add("--workers", int, "processes that load images (default: up to 4, and 0 for the digits)", default="")
    run.add("--seed", int, "of everything random")
    learning = _Group(parser, "learning")
    learning.add("--opt", str, "timm optimizer")
    learning.add("--lr", float, "highest learning rate")
    learning.add("--weight-decay", float, "none for biases and norms")
    learning.add("--layer-decay", float, "factor of the learning rate from layer to layer below")
    learning.add("--sched", str, "timm schedule", choices=SCHEDULES)
    learning.add("--warmup-epochs", int, "of growing learning rate")
    learning.add("--min-lr", float, "lowest learning rate")
    learning.add("--clip-grad", float, "largest norm of the gradient")
    learning.add("--smoothing", float, "of the labels")
    images = _Group(parser, "augmentation")
    images.add("--mixup", float, "alpha of mixup, 0 is off")
    images.add("--cutmix", float, "alpha of cutmix, 0 is off")
    images.add("--reprob", float, "probability of random erasing")
    images.add("--auto-augment", str, "timm policy, such as rand-m9-mstd0.5")
    images.add("--color-jitter", float, "strength")
    images.add("--hflip", float, "probability of a mirror image (default: 0.5, and 0 for the digits)", default="")
    images.add(
        "--scale",
        float,
        "least and largest share of the area that a crop takes",
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    images.add("--crop-pct", float, "share of the image that validation looks at (default: the model's)", default="")


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "plan": ("show what a conversion would do: stages, memory, what is left as it is", _add_plan),
    "convert": ("convert a model and write it to a file", _add_convert),
    "measure": ("measure one training step plain, checkpointed and converted", _add_measure),
    "finetune": ("fine-tune a converted model on images, and give the plain model back", _add_finetune),
}


class _Group:
    """Options that are fields of a Recipe, with its defaults in the help."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def add(self, flag: str, kind: Callable[[str], Any], text: str, *, default: str | None = None, **more: Any) -> None:
        own = {field.name: field.default for field in fields(Recipe)}[flag[2:].replace("-", "_")]
        note = default if default is not None else "off" if own is None else f"{own}".strip("()").replace(",", "")
        if "choices" not in more:
            more.setdefault("metavar", {int: "N", float: "X", Path: "DIR"}.get(kind, "NAME"))  # type: ignore[call-overload]
        self._group.add_argument(flag, type=kind, help=f"{text} (default: {note})" if note else text, **more)

    def flag(self, flag: str, text: str) -> None:
        self._group.add_argument(flag, action="store_true", default=None, help=text)


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


def _bits(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto")
    return text if text == "auto" else int(text)


def _phase(text: str) -> tuple[int, int]:
    epochs, _, bits = text.partition(":")
    if not (epochs.isdecimal() and bits.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not EPOCHS:BITS, such as 2:4")
    return int(epochs), int(bits)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)
