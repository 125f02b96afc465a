"""Recipe → a converted model fine-tuned, and the plain model back, with what each form costs.

    recipe ─open_data─▶ images
           ─create────▶ plain model ─convert─▶ converted ─train─▶ best weights ─revert─▶ plain.safetensors
                              └── with compare: train plain and checkpointed too, from the same weights

All that is written is in `recipe.out`, after every epoch, and all of an epoch or none of it (see states.py):

    best.safetensors  last.safetensors   the converted model, for revify.load; best by validation accuracy; where predictors
                                         were fitted, each has a file of them beside it
    plain.safetensors                    the best weights in the plain model, for timm's checkpoint_path=
    metrics.csv  metrics.png             an entry for every epoch
    recipe.json  result.json             what was asked for, and what came out
    state/                               optimizer and the like, to resume from
    plain/  checkpointed/                metrics and state of the other forms, with compare
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from revify.calibration.calibrating import calibrate
from revify.conversion import convert, revert
from revify.errors import RevifyError
from revify.finetuning.accelerating import accelerating
from revify.finetuning.agreement import agreement, calibration_images
from revify.finetuning.data import ImageData, make_loaders, open_data
from revify.finetuning.progress import Progress
from revify.finetuning.recipe import Recipe
from revify.finetuning.results import Epoch, Outcome, Result, best_epoch
from revify.finetuning.states import RECIPE, running, states, telling_disk_errors
from revify.finetuning.timm_models import Architecture, Created, create
from revify.finetuning.training import Form, evaluate, sample_batch, train
from revify.measuring.measuring import checkpoint_blocks, measure
from revify.plans import Plan
from revify.rewriting.applying import change_bits, copy_forecasts
from revify.saving import load, save
from revify.writing import replacing, write_text

_WEIGHTS = ("best.safetensors", "last.safetensors", "plain.safetensors")
_REPEATS = 7  # timed steps of each form, in turns


def finetune(recipe: Recipe, progress: Progress | None = None) -> Result:
    """Fine-tune a converted model, and give the plain one back.

    Device, precision and processes are Accelerate's: start the same call with `accelerate launch` or
    `torchrun` to use more than one. Only the main process writes. A run that ends early loses at most the
    epoch it was in: `resume` goes on as if nothing had happened.

    Example:
        >>> import tempfile
        >>> from revify.finetuning import Recipe, finetune
        >>> out = tempfile.mkdtemp() + "/run"
        >>> result = finetune(Recipe(model="test_vit", img_size=32, epochs=1, batch_size=256, out=out))
        >>> [outcome.form for outcome in result.outcomes]
        ['converted', 'reverted']

    Args:
        recipe: what to do.
        progress: is told what happens, in the main process; None is silence.

    Returns:
        Accuracy, memory and step time of every form, and the history.

    Raises:
        RevifyError: the data, the model, the folder or the recipe are not usable; nothing that was there is changed.
    """
    out = Path(recipe.out)
    _check_folder(out, recipe)
    with accelerating(recipe) as accelerator:
        progress = progress if progress and accelerator.is_main_process else Progress()
        set_seed(recipe.seed)
        created, data = _open(recipe, progress)
        converted = _convert(created, data, recipe, progress)
        accelerator.wait_for_everyone()  # nobody writes before everybody has checked

        with running(out, recipe.to_json(), accelerator):
            result = _run(created, converted, data, recipe, accelerator, progress)
        progress.finish(result)
        accelerator.wait_for_everyone()
        return result


def _run(
    created: Created,
    converted: nn.Module,
    data: ImageData,
    recipe: Recipe,
    accelerator: Accelerator,
    progress: Progress,
) -> Result:
    """Train all forms that are asked for, and write what came out."""
    out = Path(recipe.out)
    form = Form(
        "converted",
        converted,
        out,
        lambda model, path: save(model, path, created.record),
        partial(_change, converted, created, data, recipe, progress),
    )
    training = partial(_train, recipe=recipe, data=data, created=created, accelerator=accelerator, progress=progress)
    own, history = training(form)
    if not history:
        raise RevifyError(
            f"{recipe.model} converted does not fit into the device's memory with batches of "
            f"{recipe.batch_size}: lower the batch size (and raise grad_accum by the same factor), the "
            "image size, or the number of bits."
        )
    outcomes = [own]
    if recipe.compare:
        rivals = [training(rival)[0] for rival in _rivals(created, converted, out)]
        outcomes = _measure([*rivals, own], converted, data, recipe, accelerator)
    outcomes.append(_revert(created, recipe, data, accelerator, history))
    result = Result(out, len(data.validation), tuple(outcomes), history)
    if accelerator.is_main_process:
        with telling_disk_errors(out):
            write_text(out / "result.json", result.to_json())
    return result


def _check_folder(out: Path, recipe: Recipe) -> None:
    """Neither start over what is there, nor go on from what is not, nor train for what cannot be written."""
    if not recipe.resume:
        if found := states(out):
            raise RevifyError(f"{out} holds a run already ({found[-1]}): resume it, or give another folder.")
        if there := [name for name in _WEIGHTS if (out / name).exists()]:
            raise RevifyError(
                f"{out} holds {there[0]}, but no state from which its run could be resumed: move it away, or give another "
                "folder."
            )
        parent = next(path for path in (out, *out.absolute().parents) if path.exists())
        try:
            tempfile.TemporaryDirectory(dir=parent).cleanup()
        except OSError as error:
            raise RevifyError(f"the folder {out} cannot be written ({error}): give another one.") from error
        return
    stored = out / RECIPE
    if not states(out) and not stored.exists():
        raise RevifyError(
            f"there is nothing to resume in {out}: it holds no run. Give the folder of a run, or start without resume."
        )
    try:
        differences = recipe.differences(stored.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError) as error:
        raise RevifyError(f"{stored} cannot be read ({error}), so the run cannot be resumed.") from error
    if differences:
        raise RevifyError(
            f"resuming {out} with another recipe would not continue its run: {'; '.join(differences)}. Give "
            "the same options (only the number of epochs and compare may change), or start in another folder."
        )


def _open(recipe: Recipe, progress: Progress) -> tuple[Created, ImageData]:
    """The plain model and the data, which agree about the classes."""
    data = open_data(recipe.data, recipe.model_kwargs.get("in_chans", 3))
    if recipe.num_classes not in (None, len(data.classes)):
        raise RevifyError(
            f"num_classes is {recipe.num_classes}, but {data.name} has {len(data.classes)} classes "
            f"({', '.join(data.classes[:5])}, …): leave num_classes out, or give the right data."
        )
    wanted = Architecture(
        recipe.model,
        recipe.model_kwargs,
        recipe.img_size,
        len(data.classes),
        recipe.pretrained,
        recipe.checkpoint,
    )
    created = create(wanted)
    if created.remark:
        progress.note(created.remark)
    for remark in data.remarks:
        progress.note(remark)
    progress.note(f"{data.name}: {len(data.train)} images to train on, {len(data.validation)} to validate on")
    return created, data


def _convert(created: Created, data: ImageData, recipe: Recipe, progress: Progress) -> nn.Module:
    """The converted model, on weights of its own, so that the rivals start from the same ones."""
    example = torch.zeros(2, *created.input_size, device="meta")
    options = recipe.conversion()
    if recipe.calibrate:
        options["calibration"] = calibration_images(data, recipe.calibrate, created.model, created.input_size)
    converted = convert(copy.deepcopy(created.model), example, **options)
    if recipe.calibrate:
        progress.note(str(agreement(converted, created.model, data, created.input_size)))
    return converted


def _change(
    model: nn.Module, created: Created, data: ImageData, recipe: Recipe, progress: Progress, bits: int, fit: bool
) -> None:
    """Go on with other bits, in place: the optimizer and Accelerate's wrappers hold on to the model."""
    old: Plan = model.revify_plan  # type: ignore[assignment]  # nn.Module promises a Tensor or a Module
    plan = replace(old, stages=tuple(replace(stage.with_bits(bits), deviation=None) for stage in old.stages))
    if fit and recipe.calibrate:
        images = calibration_images(data, recipe.calibrate, created.model, created.input_size)
        fitted = calibrate(model, images, predictor=recipe.predictor or "auto", bits=bits)
        copy_forecasts(model, fitted)
        plan = fitted.revify_plan  # type: ignore[assignment]  # as above
    change_bits(model, plan)
    if fit:
        progress.note(f"{bits} bits from here on" + (", predictors fitted again" if recipe.calibrate else ""))


def _rivals(created: Created, converted: nn.Module, out: Path) -> Iterator[Form]:
    """The plain model, and the plain model with each block checkpointed, each on weights of its own."""
    yield Form("plain", copy.deepcopy(created.model), out / "plain")
    checkpointed = copy.deepcopy(created.model)
    checkpoint_blocks(checkpointed, converted.revify_plan)  # type: ignore[arg-type]  # nn.Module promises Tensor | Module
    yield Form("checkpointed", checkpointed, out / "checkpointed")


def _train(
    form: Form,
    *,
    recipe: Recipe,
    data: ImageData,
    created: Created,
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[Outcome, tuple[Epoch, ...]]:
    """Train a form: its row of the table, and its history, empty if the device is too small for it."""
    try:
        history = train(form, recipe, data, created.input_size, accelerator, progress)
    except torch.OutOfMemoryError:
        return Outcome(form.name, None, None, None, None), ()
    best = best_epoch(history)
    seconds = statistics.median(epoch.step_seconds for epoch in history)
    return Outcome(form.name, best.val_accuracy, best.epoch, best.peak_bytes, seconds), history


def _measure(
    outcomes: list[Outcome], converted: nn.Module, data: ImageData, recipe: Recipe, accelerator: Accelerator
) -> list[Outcome]:
    """The outcomes with memory and time measured side by side, which times from separate runs are not."""
    if not accelerator.is_main_process:
        return outcomes
    images, targets = sample_batch(data, recipe.batch_size, accelerator.device)
    precision = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.mixed_precision]

    def loss(output: Tensor) -> Tensor:
        return cross_entropy(output.float(), targets)

    report = measure(converted.train(), images, loss=loss, autocast=precision, repeats=_REPEATS)
    rows = {"plain": report.plain, "checkpointed": report.checkpointed, "converted": report.converted}
    return [
        replace(
            outcome,
            peak_bytes=rows[outcome.form].peak_bytes,
            step_seconds=rows[outcome.form].step_seconds,
            time_ratio=rows[outcome.form].time_ratio,
        )
        for outcome in outcomes
    ]


def _revert(
    created: Created, recipe: Recipe, data: ImageData, accelerator: Accelerator, history: tuple[Epoch, ...]
) -> Outcome:
    """Write the best weights as plain.safetensors, and judge the plain model by them."""
    out = Path(recipe.out)
    plain = revert(load(out / "best.safetensors", created.model))
    if accelerator.is_main_process:
        with telling_disk_errors(out):
            state = {name: value.cpu().clone().contiguous() for name, value in plain.state_dict().items()}
            with replacing(out / "plain.safetensors") as temporary:
                save_file(state, temporary, {"format": "pt"})  # clones: safetensors refuses memory that is shared
    _, validation = make_loaders(data, recipe, plain, created.input_size)
    _, accuracy = evaluate(plain.to(accelerator.device), accelerator.prepare(validation), accelerator)
    return Outcome("reverted", accuracy, best_epoch(history).epoch, None, None)
