"""A run after a whole epoch ↔ a folder from which to go on exactly.

    FOLDER/state/epoch-0003/    Accelerate's files (weights, optimizer, scaler, random numbers), history.json
                 …/shown/       what FOLDER shows of this epoch: best.safetensors, last.safetensors, metrics.csv, metrics.png

The folder of an epoch gets its name when everything in it is whole and on the disk. That rename is the moment from which
the epoch counts; what FOLDER shows is then linked out of it, and once more when the run is resumed. So a run that is killed, at
any moment, goes on from its last whole epoch, and shows that epoch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from revify.errors import RevifyError
from revify.finetuning.results import Epoch
from revify.writing import place, sync_all, sync_folder, write_text

RECIPE = "recipe.json"
_SIDECAR = ".predictors-"


@contextmanager
def running(folder: Path, recipe: str, accelerator: Accelerator) -> Iterator[None]:
    """A run in a folder: it begins with its recipe, without which nothing is resumed.

    A run that ends in an error before its first whole epoch leaves nothing behind. One that is killed leaves its recipe, so
    that a resume starts it again.

    Args:
        folder: of the run.
        recipe: JSON.
        accelerator: of the run; the main process writes.
    """
    if not accelerator.is_main_process:
        yield
        return
    with telling_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("**/state/.*.partial"):
            shutil.rmtree(left)
        write_text(folder / RECIPE, recipe)
    try:
        yield
    except BaseException:
        if not states(folder):
            _clear(folder)
        raise


def _clear(folder: Path) -> None:
    with suppress(OSError):  # what is raised matters more than what is left
        shutil.rmtree(folder / "state", ignore_errors=True)
        (folder / RECIPE).unlink(missing_ok=True)
        folder.rmdir()  # only if nothing else is in it


def save_state(
    folder: Path, history: list[Epoch], accelerator: Accelerator, show: Callable[[Path, Path], None]
) -> None:
    """Write the state after the last epoch of the history and show it, then remove the one before.

    Args:
        folder: of the run, or of one form.
        history: an entry for every epoch.
        accelerator: what was prepared with it is written.
        show: (to, before) writes what the folder is to show; `before` has what it shows of the epoch before.

    Raises:
        OSError: the disk refuses; the state before is kept.
    """
    name = f"epoch-{len(history):04d}"
    partial, whole = folder / "state" / f".{name}.partial", folder / "state" / name
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = {"processes": accelerator.num_processes, "epochs": [asdict(epoch) for epoch in history]}
        write_text(partial / "history.json", json.dumps(record))
        (partial / "shown").mkdir()
        show(partial / "shown", _shown(folder))
        sync_all(partial)
        partial.rename(whole)
        sync_folder(whole.parent)
        publish(folder)
        for older in states(folder):
            if older != whole:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def publish(folder: Path) -> None:
    """Let a run's folder show its last whole epoch; predictors come before the weights that name them.

    Raises:
        OSError: the disk refuses.
    """
    shown = _shown(folder)
    if shown == folder:
        return
    files = sorted(shown.iterdir(), key=lambda path: (_SIDECAR not in path.name, path.name))
    for path in files:
        place(path, folder / path.name)
    for left in folder.glob(f"*{_SIDECAR}*.safetensors"):
        if left.name not in {path.name for path in files}:
            left.unlink()
    sync_folder(folder)


def _shown(folder: Path) -> Path:
    """Where the files of the last whole epoch lie: in runs of old in the folder itself."""
    found = states(folder)
    return found[-1] / "shown" if found and (found[-1] / "shown").is_dir() else folder


def states(folder: Path) -> list[Path]:
    """The whole states in a run's folder, the latest last."""
    return sorted((folder / "state").glob("epoch-*"), key=lambda path: (len(path.name), path.name))


def load_state(folder: Path, accelerator: Accelerator) -> list[Epoch]:
    """Put everything prepared back to where the last whole epoch left it.

    Returns:
        The history up to then, empty for a new run.

    Raises:
        RevifyError: the state is damaged, of another model, or of another number of processes.
    """
    found = states(folder)
    if not found:
        return []
    try:
        record = json.loads((found[-1] / "history.json").read_text(encoding="utf-8"))
        history = [Epoch(**epoch) for epoch in record["epochs"]]
        if record["processes"] != accelerator.num_processes:
            raise RevifyError(
                f"the state in {found[-1]} was written by {record['processes']} processes, now there are "
                f"{accelerator.num_processes}: resume with the same number."
            )
        accelerator.load_state(str(found[-1]))
    except RevifyError:
        raise
    except Exception as error:  # whatever Accelerate and torch raise about damaged files
        raise RevifyError(
            f"the state in {found[-1]} cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): it is damaged or of another model. Start again in a new "
            "folder; the weights beside it are whole."
        ) from error
    return history


@contextmanager
def telling_disk_errors(folder: Path) -> Iterator[None]:
    """Errors of the disk in words."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RevifyError(
            f"{folder} cannot be written ({error}): make room or give another folder. What earlier epochs "
            "left is whole."
        ) from error
