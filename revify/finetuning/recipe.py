"""What a fine-tuning run is asked to do: one frozen record, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from revify.errors import RevifyError
from revify.words import MAX_BITS, PredictorName, SignName, Transitions, Unit

SCHEDULES = ("cosine", "tanh", "poly", "step", "none")
PRECISIONS = ("no", "bf16", "fp16")
_FREE_ON_RESUME = frozenset({"out", "epochs", "compare"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A fine-tuning run; words and defaults are timm's where it has them.

    Example:
        >>> Recipe(model="test_vit", img_size=32, epochs=2).data
        'digits'

    Args:
        model: timm name.
        model_kwargs: further arguments of `timm.create_model`.
        img_size: side of the square input in pixels; None is the model's own.
        num_classes: must be the data's; None takes it from there.
        pretrained: start from timm's weights.
        checkpoint: start from the weights in this file.
        predictor: of the previous stream value; here and in the next five None is the default of
            `revify.convert`.
        bits: residue bits per element and step; with calibration also "auto".
        grid: resolution of the grid, in bits.
        transitions: what becomes of the layers between the stages.
        unit: what one step is, "block" or "branch".
        sign: of γ.
        calibrate: training images to fit the predictors on before training starts, ≥ 0; 0 does not.
        bits_schedule: (epochs done, bits): when to go on with other bits, the predictors being fitted again; the best
            epoch is then one of those with the last bits.
        data: "digits", or a folder of images.
        out: folder for all that is written.
        epochs: in all, those before a resume included, ≥ 1.
        batch_size: images per step and process, ≥ 1.
        opt: name of a timm optimizer.
        lr: highest learning rate, > 0.
        weight_decay: ≥ 0; none for biases and norms.
        layer_decay: factor of the learning rate from one layer to the layer below, in (0, 1]; None is 1.
        sched: name of a timm schedule, stepped at every update.
        warmup_epochs: of linearly growing learning rate, ≥ 0.
        min_lr: lowest learning rate.
        grad_accum: steps per update, ≥ 1.
        clip_grad: largest norm of the gradient; None does not clip.
        smoothing: of the labels, in [0, 1).
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of cutmix; 0 is off.
        reprob: probability of random erasing, 0…1.
        auto_augment: a timm policy such as "rand-m9-mstd0.5"; None is off.
        color_jitter: strength, ≥ 0; 0 is off.
        hflip: probability of a mirror image; None is .5, and 0 for the digits.
        scale: least and largest share of the image's area that a training crop takes.
        crop_pct: share of the image that validation looks at; None is the model's own, and 1 for the digits.
        workers: processes that load images; None is up to 4, by the number of cores, and 0 for the digits.
        mixed_precision: "no", "bf16" or "fp16".
        seed: of everything random.
        resume: continue the run in `out`.
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
    grid: int | None = None
    transitions: Transitions | None = None
    unit: Unit | None = None
    sign: SignName | None = None
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
        low, high = self.scale
        starts = [start for start, _ in self.bits_schedule]
        fitting = all(0 <= bits <= MAX_BITS for _, bits in self.bits_schedule)
        mixes = self.mixup > 0 or self.cutmix > 0
        rules = (
            (self.epochs >= 1, f"epochs is {self.epochs}; at least 1 is needed"),
            (self.batch_size >= 1, f"batch_size is {self.batch_size}; at least 1 is needed"),
            (
                not mixes or self.batch_size % 2 == 0,
                f"mixup and cutmix need an even batch size, not {self.batch_size}",
            ),
            (self.grad_accum >= 1, f"grad_accum is {self.grad_accum}; at least 1 is needed"),
            (self.lr > 0, f"lr is {self.lr}; it must be above 0"),
            (self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must be 0 or above"),
            (
                self.layer_decay is None or 0 < self.layer_decay <= 1,
                f"layer_decay is {self.layer_decay}, not in (0, 1]",
            ),
            (
                self.clip_grad is None or self.clip_grad > 0,
                f"clip_grad is {self.clip_grad}; it must be above 0",
            ),
            (self.warmup_epochs >= 0, f"warmup_epochs is {self.warmup_epochs}; it must be 0 or above"),
            (0 <= self.smoothing < 1, f"smoothing is {self.smoothing}, not in [0, 1)"),
            (
                min(self.mixup, self.cutmix, self.color_jitter) >= 0,
                "mixup, cutmix and color_jitter must be 0 or above",
            ),
            (self.calibrate >= 0, f"calibrate is {self.calibrate}; it must be 0 or above"),
            (
                starts == sorted(set(starts)) and all(1 <= start < self.epochs for start in starts) and fitting,
                f"bits_schedule is {self.bits_schedule}; expected pairs (epochs done, bits) with rising numbers of epochs, "
                f"1 to {self.epochs - 1}, and 0 to {MAX_BITS} bits",
            ),
            (0 <= self.reprob <= 1, f"reprob is {self.reprob}, not in [0, 1]"),
            (self.hflip is None or 0 <= self.hflip <= 1, f"hflip is {self.hflip}, not in [0, 1]"),
            (0 < low <= high <= 1, f"scale is {self.scale}; expected 0 < low <= high <= 1"),
            (self.crop_pct is None or 0 < self.crop_pct <= 1, f"crop_pct is {self.crop_pct}, not in (0, 1]"),
            (self.workers is None or self.workers >= 0, f"workers is {self.workers}; it must be 0 or above"),
            (self.sched in SCHEDULES, f"sched is {self.sched!r}; choose one of {', '.join(SCHEDULES)}"),
            (
                self.mixed_precision in PRECISIONS,
                f"mixed_precision is {self.mixed_precision!r}; choose one of {PRECISIONS}",
            ),
        )
        for holds, fault in rules:
            if not holds:
                raise RevifyError(f"the recipe for {self.model}: {fault}.")

    def phases(self, epochs: int) -> list[int]:
        """The bits that the schedule has brought before the epoch after this many, in order."""
        return [bits for start, bits in self.bits_schedule if start < epochs]

    def conversion(self) -> dict[str, Any]:
        """The arguments of `revify.convert` that the recipe gives."""
        given = {name: getattr(self, name) for name in ("predictor", "bits", "grid", "transitions", "unit", "sign")}
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
