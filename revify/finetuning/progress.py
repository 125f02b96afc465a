"""A run that tells what it does → silence, or lines and a bar on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revify.finetuning.results import Epoch, Result

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Progress:
    """Where a run tells what it does; this one is silent. An error raised here ends the run."""

    def note(self, text: str) -> None:
        """Something that the user should know, once."""

    def start(self, form: str, first_epoch: int, epochs: int, steps: int) -> None:
        """A form of the model is about to be trained, from this epoch (from 0), this many steps an epoch."""

    def step(self, epoch: int, loss: float) -> None:
        """A step is done."""

    def epoch(self, form: str, row: Epoch) -> None:
        """An epoch is done, and everything about it is written."""

    def stop(self) -> None:
        """The form is trained, or the run has failed."""

    def finish(self, result: Result) -> None:
        """The run is done."""


class ConsoleProgress(Progress):
    """A bar for the form in training, a line for every epoch, and at the end the result on standard output.

    Args:
        console: for all but the result; usually of the standard error.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Bars | None = None
        self._task: TaskID
        self._epochs = 0

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def start(self, form: str, first_epoch: int, epochs: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._epochs = epochs
        self._bars = Bars(
            TextColumn("{task.description:<13}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, epoch {task.fields[epoch]}, loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._bars.start()
        self._task = self._bars.add_task(
            form,
            total=epochs * steps,
            completed=first_epoch * steps,
            epoch=first_epoch + 1,
            loss=float("nan"),
        )

    def step(self, epoch: int, loss: float) -> None:
        if self._bars:
            self._bars.update(self._task, advance=1, epoch=epoch + 1, loss=loss)

    def epoch(self, form: str, row: Epoch) -> None:
        self.note(
            f"{form:<13} epoch {row.epoch}/{self._epochs}  train loss {row.train_loss:.3f} accuracy "
            f"{row.train_accuracy:.2%}  validation loss {row.val_loss:.3f} accuracy {row.val_accuracy:.2%}  "
            f"step {row.step_seconds:.3f} s"
        )

    def stop(self) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def finish(self, result: Result) -> None:
        print(result)
        self.note(f"weights, metrics and state are in {result.out}")
