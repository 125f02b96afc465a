"""A run after a whole epoch ↔ a folder from which to go on exactly.

The folder has its name only once it is whole; then the one of the epoch before goes:

    FOLDER/state/epoch-0003/    Accelerate's files (weights, optimizer, scaler, random numbers), and history.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from revify.errors import RevifyError
from revify.finetuning.results import Epoch, write_text


def save_state(folder: Path, history: list[Epoch], accelerator: Accelerator) -> None:
    """Write the state after the last epoch of the history, then remove the one before.

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
        partial.rename(whole)
        for older in states(folder):
            if older != whole:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def states(folder: Path) -> list[Path]:
    """The whole states in a run's folder, the latest last."""
    return sorted((folder / "state").glob("epoch-*"))


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
