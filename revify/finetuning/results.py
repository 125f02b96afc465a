"""What a run has measured → metrics.csv, metrics.png, and a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from revify.printing import draw_table
from revify.writing import replacing, write_text


@dataclass(frozen=True, slots=True)
class Epoch:
    """One row of metrics.csv.

    Args:
        epoch: from 1.
        lr: highest learning rate of the epoch's last update.
        train_loss: mean over the epoch's images, augmented and smoothed as they were.
        train_accuracy: of the same images, while the weights changed, 0…1.
        val_loss: mean cross-entropy over the validation images, without smoothing.
        val_accuracy: 0…1.
        step_seconds: median over the epoch's steps, forward, backward and update.
        peak_bytes: the most that one step allocates beside weights, gradients and the optimizer's state.
        phase: how often the bits had been changed by then.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    step_seconds: float
    peak_bytes: int
    phase: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the final table; None where it was not measured, as after an error for want of memory.

    Args:
        form: plain, checkpointed, converted or reverted.
        accuracy: on the validation images, at the best epoch, 0…1.
        best_epoch: from 1; of a reverted model, that of the converted one.
        peak_bytes: the most that a step allocates beside weights, gradients and the optimizer's state.
        step_seconds: with compare, of forward and backward as `revify.measure` takes it, all forms in turns
            on one batch; without, the median of the epochs' medians.
        time_ratio: with compare, to checkpointed, as `revify.measure` takes it.
    """

    form: str
    accuracy: float | None
    best_epoch: int | None
    peak_bytes: int | None
    step_seconds: float | None
    time_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What `finetune` found; prints as a table.

    Args:
        out: the folder with everything that was written.
        images: how many the accuracies were measured on.
        outcomes: the forms in the order of the table; converted and reverted are always there.
        epochs: of the converted model.
    """

    out: Path
    images: int
    outcomes: tuple[Outcome, ...]
    epochs: tuple[Epoch, ...]

    def outcome(self, form: str) -> Outcome:
        """The row of one form."""
        return next(outcome for outcome in self.outcomes if outcome.form == form)

    def to_json(self) -> str:
        """The same as JSON, one object."""
        return json.dumps({**asdict(self), "out": str(self.out)}, indent=2)

    def __str__(self) -> str:
        rival = next((o for o in self.outcomes if o.form == "checkpointed"), None)
        how = "forward and backward, median, in turns on one batch" if rival else "median, with the update"
        notes = [
            "peak MB: 10^6 bytes that one step allocates beside weights, gradients and optimizer state",
            f"step: {how}; accuracy: at the best epoch, {self.images} validation images",
            "reverted: the converted model's best weights in the plain model (plain.safetensors)",
        ]
        if rival:
            notes.insert(2, "ratio: to checkpointed, which is the plain model with each block checkpointed")
        return draw_table(
            ("", ">peak MB", ">ratio", ">step s", ">ratio", ">accuracy", ">epoch"),
            [(outcome.form, *_cells(outcome, rival)) for outcome in self.outcomes],
            notes=notes,
        )


def _cells(outcome: Outcome, rival: Outcome | None) -> tuple[str, ...]:
    if outcome.accuracy is None:
        return ("out of memory",)
    costs = ("-",) * 4
    if outcome.peak_bytes is not None and outcome.step_seconds is not None:
        memory = _ratio(outcome.peak_bytes, rival.peak_bytes if rival else None)
        time = f"{outcome.time_ratio:.3f}" if outcome.time_ratio else "-"
        costs = (f"{outcome.peak_bytes / 1e6:.2f}", memory, f"{outcome.step_seconds:.4f}", time)
    return *costs, f"{outcome.accuracy:.2%}", str(outcome.best_epoch)


def _ratio(value: float, rival: float | None) -> str:
    return f"{value / rival:.3f}" if rival else "-"


def best_epoch(history: Sequence[Epoch]) -> Epoch:
    """The first epoch with the highest validation accuracy, of those with the bits of the last."""
    latest = [epoch for epoch in history if epoch.phase == history[-1].phase]
    return max(latest, key=lambda epoch: (epoch.val_accuracy, -epoch.epoch))


def write_metrics(folder: Path, title: str, epochs: Sequence[Epoch]) -> None:
    """Write metrics.csv, a row an epoch, and metrics.png, loss and accuracy over the epochs."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Epoch)])
    writer.writerows(astuple(epoch) for epoch in epochs)
    write_text(folder / "metrics.csv", text.getvalue())
    _plot(folder / "metrics.png", title, epochs)


def _plot(path: Path, title: str, epochs: Sequence[Epoch]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.14, top=0.9)
    FigureCanvasAgg(figure)
    numbers = [epoch.epoch for epoch in epochs]
    for place, what in enumerate(("loss", "accuracy")):
        axes = figure.add_subplot(1, 2, place + 1)
        for part, label in (("train", "training, augmented"), ("val", "validation")):
            axes.plot(numbers, [getattr(e, f"{part}_{what}") for e in epochs], marker=".", label=label)
        axes.set(
            xlabel="epoch",
            ylabel=what,
            title=title if place == 0 else f"best {best_epoch(epochs).val_accuracy:.2%}",
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
