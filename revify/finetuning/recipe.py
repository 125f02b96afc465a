"""What a fine-tuning run is asked to do: one frozen record, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from revify.errors import RevifyError
from revify.methods import Method, Options
from revify.words import MAX_BITS, PredictorName, SignName, StepName, Transitions, Unit

SCHEDULES = ("cosine", "tanh", "poly", "step", "none")
PRECISIONS = ("no", "bf16", "fp16")
_FREE_ON_RESUME = frozenset({"out", "epochs", "compare"})


@dataclass(frozen=True, slots=True)
class Limit:
    """What a value must be: in words, and as a test."""

    text: str
    holds: Callable[[Any], bool]  # Any: numbers and words


def _at_least(least: float) -> Limit:
    return Limit(f"at least {least:g} is needed", lambda value: value >= least)


def _above_zero() -> Limit:
    return Limit("it must be above 0", lambda value: value > 0)


def _share(*, above: float = -1, below: float = 2) -> Limit:
    """From 0 to 1, where one of the ends may be left out."""
    low, high = "(" if above == 0 else "[", ")" if below == 1 else "]"
    return Limit(f"it must be in {low}0, 1{high}", lambda value: above < value < below and 0 <= value <= 1)


def _one_of(words: Sequence[str]) -> Limit:
    return Limit(f"choose one of {', '.join(words)}", lambda value: value in words)


LIMITS = {
    "epochs": _at_least(1),
    "batch_size": _at_least(1),
    "grad_accum": _at_least(1),
    "calibrate": _at_least(0),
    "warmup_epochs": _at_least(0),
    "workers": _at_least(0),
    "weight_decay": _at_least(0),
    "mixup": _at_least(0),
    "cutmix": _at_least(0),
    "color_jitter": _at_least(0),
    "lr": _above_zero(),
    "clip_grad": _above_zero(),
    "layer_decay": _share(above=0),
    "crop_pct": _share(above=0),
    "smoothing": _share(below=1),
    "reprob": _share(),
    "hflip": _share(),
    "sched": _one_of(SCHEDULES),
    "mixed_precision": _one_of(PRECISIONS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A fine-tuning run; words and defaults are timm's where it has them.

    Example:
        >>> Recipe(model="test_vit", img_size=32, epochs=2).data
        'digits'

    Args:
        model: timm name.
        model_kwargs: more arguments for `timm.create_model`, such as depth=24 drop_path_rate=.1.
        img_size: side of the input image in pixels; by default the model's.
        num_classes: how many classes there are; by default those of the data or the weights.
        pretrained: start from timm's weights, which takes a network.
        checkpoint: start from the weights in this file.
        predictor: as in `revify.Method`, like the next six; None is the default there.
        bits: the same.
        grid: the same.
        transitions: the same.
        unit: the same.
        sign: the same.
        step: the same.
        calibrate: training images to fit the predictors on before training starts, by default 0, which does not.
        bits_schedule: when to go on with other bits, as pairs of epochs done and bits, such as 2:4; the predictors are
            fitted again, and the best epoch is then one of those with the last bits.
        data: a folder of images, DIR/train and DIR/val, or DIR, each with a folder per class; or "digits".
        out: folder for all that is written.
        epochs: in all, those before a resume included, at least 1.
        batch_size: images per step and process, at least 1.
        opt: name of a timm optimizer.
        lr: highest learning rate, above 0.
        weight_decay: from 0 upward; none for biases and norms.
        layer_decay: factor of the learning rate from one layer to the layer below, up to 1; by default off.
        sched: name of a timm schedule, stepped at every update.
        warmup_epochs: epochs of linearly growing learning rate.
        min_lr: lowest learning rate.
        grad_accum: steps per update, at least 1.
        clip_grad: largest norm of the gradient.
        smoothing: of the labels, from 0 to below 1.
        mixup: alpha of mixup; by default 0, which is off.
        cutmix: alpha of cutmix; by default 0, which is off.
        reprob: probability of random erasing; by default 0.
        auto_augment: a timm policy such as rand-m9-mstd0.5; by default off.
        color_jitter: strength; by default 0, which is off.
        hflip: probability of a mirror image; by default .5, and 0 for the digits.
        scale: least and largest share of the image's area that a training crop takes.
        crop_pct: share of the image that validation looks at; by default the model's own, and 1 for the digits.
        workers: processes that load images; by default up to 4, by the number of cores, and 0 for the digits.
        mixed_precision: precision of the forward pass: no, bf16 or fp16.
        seed: of everything random.
        resume: continue the run in the folder after its last whole epoch.
        compare: train the plain and the checkpointed model too, with the same seed and budget.

    Raises:
        RevifyError: a value out of its range.
    """

    model: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    num_classes: int | None = None
    pretrained: bool = False
    checkpoint: Path | None = None
    predictor: PredictorName | None = None
    bits: int | Literal["auto"] | None = None
    grid: int | Literal["auto"] | None = None
    transitions: Transitions | None = None
    unit: Unit | None = None
    sign: SignName | None = None
    step: StepName | None = None
    calibrate: int = 0
    bits_schedule: tuple[tuple[int, int], ...] = ()
    data: str | Path = "digits"
    out: Path = Path("runs/finetune")
    epochs: int = 3
    batch_size: int = 32
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 1
    min_lr: float = 1e-6
    grad_accum: int = 1
    clip_grad: float | None = 1.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    reprob: float = 0.0
    auto_augment: str | None = None
    color_jitter: float = 0.0
    hflip: float | None = None
    scale: tuple[float, float] = (0.8, 1.0)
    crop_pct: float | None = None
    workers: int | None = None
    mixed_precision: str = "no"
    seed: int = 0
    resume: bool = False
    compare: bool = False

    def __post_init__(self) -> None:
        Method.of(**self.conversion())
        for fault in self._faults():
            raise RevifyError(f"the recipe for {self.model}: {fault}.")

    def _faults(self) -> Iterator[str]:
        """What is out of its range, and what does not go together."""
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not limit.holds(value):
                yield f"{name} is {value!r}; {limit.text}"
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            yield f"mixup and cutmix need an even batch size, not {self.batch_size}"
        low, high = self.scale
        if not 0 < low <= high <= 1:
            yield f"scale is {self.scale}; expected 0 < low <= high <= 1"
        starts = [start for start, _ in self.bits_schedule]
        rising = starts == sorted(set(starts)) and all(1 <= start < self.epochs for start in starts)
        if not rising or not all(0 <= bits <= MAX_BITS for _, bits in self.bits_schedule):
            yield (
                f"bits_schedule is {self.bits_schedule}; expected pairs (epochs done, bits) with rising numbers of epochs, "
                f"1 to {self.epochs - 1}, and 0 to {MAX_BITS} bits"
            )

    def phases(self, epochs: int) -> list[int]:
        """The bits that the schedule has brought before the epoch after this many, in order."""
        return [bits for start, bits in self.bits_schedule if start < epochs]

    def conversion(self) -> dict[str, Any]:  # Any: the values of Method's fields
        """The arguments of `revify.convert` that the recipe gives."""
        names = [field.name for field in fields(self) if field.name in Options.__annotations__]
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def to_json(self) -> str:
        """The recipe as JSON, one object."""
        return json.dumps(self._plain(), indent=2)

    def differences(self, text: str) -> list[str]:
        """What in a stored recipe would make the continuation of its run a different run."""
        stored = json.loads(text)
        return [
            f"{name} was {stored.get(name)!r}, is {value!r}"
            for name, value in self._plain().items()
            if name not in _FREE_ON_RESUME and stored.get(name) != value
        ]

    def _plain(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if name != "resume"}
        return json.loads(json.dumps(values, default=str))
