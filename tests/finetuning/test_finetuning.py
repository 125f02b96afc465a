"""Fine-tuning: what is written, exact resumption, several processes, comparison, and bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from timm.scheduler import create_scheduler_v2
from torch import Tensor

from revify.errors import RevifyError
from revify.finetuning import finetune
from revify.finetuning.data import open_data
from revify.finetuning.progress import Progress
from revify.finetuning.recipe import Recipe
from revify.finetuning.results import Epoch, Outcome, Result
from revify.finetuning.timm_models import Architecture, create
from revify.saving import load

MODEL: dict[str, Any] = {"model": "test_vit", "img_size": 16, "model_kwargs": {"patch_size": 8, "depth": 4}}
STILL: dict[str, Any] = {"scale": (1.0, 1.0), "hflip": 0.0}  # a crop of all of a square image is the image


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose more time in handing work to threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_images(folder: Path, classes: str, count: int, first: int = 0) -> Path:
    """Digits of some classes as PNG files, a folder per class."""
    digits = load_digits()
    for name in classes:
        (folder / name).mkdir(parents=True)
        chosen = digits.images[digits.target == int(name)][first : first + count]
        for number, image in enumerate(chosen):
            Image.fromarray((image * 15).astype(np.uint8)).save(folder / name / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images of three classes to train on, 9 to validate on."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", "014", 12)
    write_images(folder / "val", "014", 3, first=12)
    return folder


def recipe(images: Path, out: Path, **changes: Any) -> Recipe:
    defaults = {**MODEL, "data": images, "workers": 0, "epochs": 2, "batch_size": 8, "lr": 2e-3}
    return Recipe(**{**defaults, "out": out, **changes})


def weights(out: Path) -> dict[str, Tensor]:
    """Of the last epoch, with the predictors that lie beside them."""
    files = [out / "last.safetensors", *out.glob("last.predictors-*.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


def untimed(epochs: tuple[Epoch, ...]) -> list[Epoch]:
    return [dataclasses.replace(epoch, step_seconds=0.0, peak_bytes=0) for epoch in epochs]


class InterruptAfter(Progress):
    """Ends the run after an epoch, as Ctrl-C does."""

    def __init__(self, epoch: int) -> None:
        self.last = epoch

    def epoch(self, form: str, row: Epoch) -> None:
        if row.epoch == self.last:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run with everything in it that draws random numbers."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return finetune(random_recipe(images, out))


def random_recipe(images: Path, out: Path, **changes: Any) -> Recipe:
    kwargs = {**MODEL["model_kwargs"], "drop_path_rate": 0.2, "proj_drop_rate": 0.1}
    shaken = {"model_kwargs": kwargs, "mixup": 0.2, "reprob": 0.3, "color_jitter": 0.2, "clip_grad": 1.0}
    return recipe(images, out, **{**shaken, **changes})


def test_a_run_writes_what_it_promises(finished: Result) -> None:
    assert {path.name for path in finished.out.iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "plain.safetensors",
        "metrics.csv",
        "metrics.png",
        "recipe.json",
        "result.json",
        "state",
    }
    with open(finished.out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(row["val_loss"]) for row in rows] == [epoch.val_loss for epoch in finished.epochs]
    assert all(float(row["step_seconds"]) > 0 and int(row["peak_bytes"]) > 0 for row in rows)
    with Image.open(finished.out / "metrics.png") as plot:
        assert plot.size[0] > 600
    stored = json.loads((finished.out / "result.json").read_text())
    assert stored["outcomes"][0]["accuracy"] == finished.outcome("converted").accuracy


def test_the_learning_rate_follows_timms_schedule(finished: Result) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    updates = 36 // 8
    schedule, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=2,
        warmup_epochs=1,
        warmup_lr=2e-5,
        min_lr=1e-6,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    expected = []
    for update in range(2 * updates):
        expected.append(optimizer.param_groups[0]["lr"])  # what the update with this number, from 0, uses
        schedule.step_update(update + 1)
    assert [epoch.lr for epoch in finished.epochs] == [expected[updates - 1], expected[2 * updates - 1]]
    assert len(set(expected)) == len(expected)


def test_the_plain_checkpoint_is_the_converted_model_reverted(finished: Result, images: Path) -> None:
    data = open_data(images, 3)
    kwargs = {**MODEL["model_kwargs"], "img_size": 16, "num_classes": 3}
    plain = timm.create_model("test_vit", **kwargs).eval()
    plain.load_state_dict(load_file(finished.out / "plain.safetensors"), strict=True)
    converted = load(finished.out / "best.safetensors").eval()
    assert_equal(plain.state_dict(), converted.state_dict())

    config = timm.data.resolve_data_config({"input_size": (3, 16, 16)}, model=plain)
    data.validation.transform = timm.data.create_transform(**config)
    batch = torch.stack([data.validation[i][0] for i in range(len(data.validation))])
    targets = torch.tensor([data.validation[i][1] for i in range(len(data.validation))])
    with torch.no_grad():
        accuracy = {
            form: (model(batch).argmax(1) == targets).float().mean().item()
            for form, model in (("reverted", plain), ("converted", converted))
        }
    assert accuracy["reverted"] == pytest.approx(finished.outcome("reverted").accuracy)
    assert accuracy["converted"] == pytest.approx(finished.outcome("converted").accuracy)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_ends_in_the_same_weights(images: Path, tmp_path: Path, workers: int) -> None:
    whole = finetune(random_recipe(images, tmp_path / "whole", workers=workers))
    with pytest.raises(KeyboardInterrupt):
        finetune(random_recipe(images, tmp_path / "cut", workers=workers), InterruptAfter(1))
    half = weights(tmp_path / "cut")
    resumed = finetune(random_recipe(images, tmp_path / "cut", workers=workers, resume=True))

    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert untimed(whole.epochs) == untimed(resumed.epochs)
    assert not torch.equal(half["head.weight"], weights(tmp_path / "cut")["head.weight"])


def test_a_run_can_be_made_longer(images: Path, tmp_path: Path) -> None:
    finetune(recipe(images, tmp_path / "run", epochs=1, sched="none"))
    longer = finetune(recipe(images, tmp_path / "run", epochs=2, sched="none", resume=True))
    finetune(recipe(images, tmp_path / "whole", epochs=2, sched="none"))
    assert len(longer.epochs) == 2
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_another_seed_is_another_run(finished: Result, images: Path, tmp_path: Path) -> None:
    other = finetune(random_recipe(images, tmp_path / "run", seed=1))
    assert other.epochs[0].train_loss != finished.epochs[0].train_loss


def test_accumulation_is_a_larger_batch(images: Path, tmp_path: Path) -> None:
    small = {"epochs": 1, "sched": "none", "clip_grad": None, "opt": "sgd", "lr": 0.05, **STILL}
    finetune(recipe(images, tmp_path / "large", batch_size=12, **small))
    finetune(recipe(images, tmp_path / "small", batch_size=6, grad_accum=2, **small))
    one, other = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    finetune(recipe(images, tmp_path / "plain", batch_size=6, **small))
    assert (one["head.weight"] - weights(tmp_path / "plain")["head.weight"]).abs().max() > 1e-4


def test_compare_trains_all_forms_alike(images: Path, tmp_path: Path) -> None:
    result = finetune(recipe(images, tmp_path / "run", img_size=64, epochs=1, compare=True))
    assert [outcome.form for outcome in result.outcomes] == ["plain", "checkpointed", "converted", "reverted"]
    rows = {}
    for form in ("plain", "checkpointed"):
        with open(tmp_path / "run" / form / "metrics.csv", newline="") as file:
            rows[form] = [
                {key: value for key, value in row.items() if key not in ("step_seconds", "peak_bytes")}
                for row in csv.DictReader(file)
            ]
    assert rows["plain"] == rows["checkpointed"]
    peaks = [result.outcome(form).peak_bytes for form in ("converted", "checkpointed", "plain")]
    assert peaks == sorted(peaks, key=lambda peak: peak or 0)
    assert peaks[0] != peaks[2]
    assert [line.split()[0] for line in str(result).splitlines()[2:6]] == [o.form for o in result.outcomes]


def test_it_learns(images: Path, tmp_path: Path) -> None:
    result = finetune(recipe(images, tmp_path / "run", epochs=6, sched="none", lr=5e-3, **STILL))
    assert (result.outcome("converted").accuracy or 0) >= 8 / 9
    assert (result.outcome("reverted").accuracy or 0) >= 8 / 9


def test_half_precision(images: Path, tmp_path: Path) -> None:
    result = finetune(recipe(images, tmp_path / "run", epochs=1, mixed_precision="bf16"))
    exact = finetune(recipe(images, tmp_path / "exact", epochs=1))
    assert result.epochs[0].train_loss == pytest.approx(exact.epochs[0].train_loss, rel=0.1)
    assert result.epochs[0].train_loss != exact.epochs[0].train_loss


SCRIPT = """
import json, sys
from revify.finetuning import finetune
from revify.finetuning.recipe import Recipe
fields = json.loads(sys.argv[1])
finetune(Recipe(**{**fields, "scale": tuple(fields["scale"])}))
"""


def test_two_processes_are_one_with_twice_the_batch(images: Path, tmp_path: Path) -> None:
    common = {"epochs": 1, "opt": "sgd", "lr": 0.05, "sched": "none", "clip_grad": None, **STILL}
    single = finetune(recipe(images, tmp_path / "single", batch_size=8, **common))
    changes = {**common, "batch_size": 4}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    fields = {**MODEL, **changes, "data": str(images), "workers": 0, "out": str(tmp_path / "double")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [*torchrun, str(script), json.dumps(fields)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stored = json.loads((tmp_path / "double" / "result.json").read_text())
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert stored["epochs"][0][name] == pytest.approx(getattr(single.epochs[0], name), rel=1e-4), name
    one, other = weights(tmp_path / "single"), weights(tmp_path / "double")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(RevifyError, match="written by 2 processes, now there are 1"):
        finetune(recipe(images, tmp_path / "double", **{**changes, "epochs": 2, "resume": True}))


# Data


def test_a_folder_is_split_in_a_fixed_way(tmp_path: Path) -> None:
    folder = write_images(tmp_path, "27", 10)
    first, second = open_data(folder, 3), open_data(folder, 3)
    assert first.validation.samples == second.validation.samples
    assert sorted(target for _, target in first.validation.samples) == [0, 0, 1, 1]
    assert not {path for path, _ in first.train.samples} & {path for path, _ in first.validation.samples}
    assert len(first.train) == 16
    assert first.classes == ("2", "7")


def test_digits() -> None:
    data = open_data("digits", 1)
    assert (len(data.train), len(data.validation), len(data.classes)) == (1438, 359, 10)
    assert data.hflip == 0
    picture, target = data.train.samples[0]
    assert isinstance(picture, Image.Image)
    assert (picture.size, target) == ((8, 8), 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text("no folder"), "is not a folder"),
        (lambda folder: (folder / "cat").mkdir(parents=True), "has no images"),
        (lambda folder: write_images(folder, "3", 4), "has one class only"),
        (lambda folder: write_images(folder, "35", 1), "has one image only"),
        (lambda folder: write_images(folder / "train", "35", 4), "but no val/"),
        (
            lambda folder: (write_images(folder / "train", "35", 4), write_images(folder / "val", "36", 4)),
            r"classes differ.*train: 5.*val: 6",
        ),
        (
            lambda folder: (folder.mkdir(), Image.new("RGB", (8, 8)).save(folder / "stray.png")),
            "in no class folder",
        ),
    ],
)
def test_unusable_folders(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(RevifyError, match=message):
        finetune(recipe(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path / "data" / "train", "35", 4)
    write_images(tmp_path / "data" / "val", "35", 2)
    broken = tmp_path / "data" / "train" / "5" / "02.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(RevifyError, match=r"02\.png cannot be read") as caught:
        finetune(recipe(tmp_path / "data", tmp_path / "run", workers=workers, batch_size=4))
    assert "Traceback" not in str(caught.value)


# Recipes, folders and weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 7}, "num_classes is 7, but .* has 3 classes"),
        ({"batch_size": 40}, "fewer than one batch of 40"),
        ({"opt": "adamx"}, "optimizer 'adamx'"),
        ({"auto_augment": "nonsense"}, "augmentation"),
        ({"mixed_precision": "fp16"}, "fp16 does not work on this device"),
        ({"bits": 9}, "bits"),
        ({"model": "test_vitt"}, "nearest: test_vit"),
        ({"model_kwargs": {"in_chans": 5}}, "5 channels"),
        ({"checkpoint": Path("none.safetensors")}, "no such file"),
        ({"lr": 1e18, "clip_grad": None, "opt": "sgd"}, "lower the learning rate|left the range|finite"),
    ],
)
def test_unusable_recipes(images: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RevifyError, match=message):
        finetune(recipe(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"scale": (0.9, 0.5)},
        {"smoothing": 1.0},
        {"mixup": 0.1, "batch_size": 7},
        {"sched": "plateau"},
        {"mixed_precision": "fp8"},
    ],
)
def test_a_recipe_checks_itself(images: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(RevifyError, match=next(iter(changes))):
        recipe(images, tmp_path, **changes)


def test_a_finished_run_is_not_started_over(finished: Result, images: Path) -> None:
    before = weights(finished.out)
    with pytest.raises(RevifyError, match="holds a run already"):
        finetune(random_recipe(images, finished.out))
    with pytest.raises(RevifyError, match=r"another recipe.*lr was 0.002, is 0.1"):
        finetune(random_recipe(images, finished.out, lr=0.1, resume=True))
    assert_equal(before, weights(finished.out))


def test_nothing_to_resume(images: Path, tmp_path: Path) -> None:
    with pytest.raises(RevifyError, match="nothing to resume"):
        finetune(recipe(images, tmp_path / "run", resume=True))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").touch()
    with pytest.raises(RevifyError, match="no state from which its run could be resumed: move it away"):
        finetune(recipe(images, tmp_path / "run"))


def test_a_full_disk_leaves_the_epoch_before(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune(recipe(images, tmp_path / "run", epochs=1, sched="none"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("revify.finetuning.training.write_metrics", full)
    with pytest.raises(RevifyError, match="No space left on device"):
        finetune(recipe(images, tmp_path / "run", epochs=2, sched="none", resume=True))
    monkeypatch.undo()
    states = [path for path in before if "state" in path.parts]
    assert len(states) >= 4
    assert all(path.read_bytes() == before[path] for path in states)


def test_a_damaged_state_is_told(images: Path, tmp_path: Path) -> None:
    finetune(recipe(images, tmp_path / "run", epochs=1))
    file = tmp_path / "run" / "state" / "epoch-0001" / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RevifyError, match=r"epoch-0001 cannot be read"):
        finetune(recipe(images, tmp_path / "run", resume=True))


def test_weights_keep_their_classifier_if_it_fits(finished: Result) -> None:
    file = finished.out / "plain.safetensors"
    wanted = Architecture("test_vit", MODEL["model_kwargs"], 16, None, False, file)
    created = create(wanted)
    assert_equal(created.model.state_dict(), load_file(file))
    assert created.remark is None
    assert created.record["kwargs"]["num_classes"] == 3
    assert "state_dict" not in created.model.pretrained_cfg

    other = create(dataclasses.replace(wanted, num_classes=5))
    assert other.model.head.out_features == 5
    assert torch.equal(other.model.patch_embed.proj.weight, created.model.patch_embed.proj.weight)
    assert "3 classes, the model 5" in (other.remark or "")
    with pytest.raises(RevifyError, match="do not fit"):
        create(dataclasses.replace(wanted, kwargs={"patch_size": 8, "depth": 3}))


def test_a_form_without_memory_has_its_row() -> None:
    rows = (Outcome("plain", None, None, None, None), Outcome("converted", 0.5, 1, 10**6, 0.1))
    text = str(Result(Path("run"), 4, rows, ()))
    assert "plain" in text
    assert "out of memory" in text
    assert "50.00%" in text


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds timm's accuracy against the run's."""
    script = Path(__file__).parents[2] / "examples" / "finetune_digits.py"
    main = runpy.run_path(str(script))["main"]
    main("test_vit", 1, tmp_path / "run")
    assert "by timm alone" in capsys.readouterr().out


def test_a_calibrated_run_resumes_to_the_same_weights(images: Path, tmp_path: Path) -> None:
    fitted = {"calibrate": 8, "predictor": "diagonal", "bits": 1}
    notes = Notes()
    finetune(recipe(images, tmp_path / "whole", **fitted), notes)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe(images, tmp_path / "cut", **fitted), InterruptAfter(1))
    finetune(recipe(images, tmp_path / "cut", resume=True, **fitted))
    assert any("revify_scale" in name for name in weights(tmp_path / "whole"))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert any("converted and original agree on" in note for note in notes.notes)


@pytest.mark.parametrize("cut_after", [1, 2])
@pytest.mark.parametrize("fitted", [{"calibrate": 8, "predictor": "diagonal"}, {}], ids=["fitted", "fixed"])
@pytest.mark.sampled(4)
def test_a_schedule_of_bits_is_kept_and_resumed(
    images: Path, tmp_path: Path, fitted: dict[str, Any], cut_after: int
) -> None:
    asked = {**fitted, "bits": 0, "epochs": 3, "bits_schedule": ((1, 2), (2, 4))}
    notes = Notes()
    result = finetune(recipe(images, tmp_path / "whole", **asked), notes)
    assert [epoch.phase for epoch in result.epochs] == [0, 1, 2]
    assert result.outcome("converted").best_epoch == 3  # the only one with the last bits
    assert [note.partition(",")[0] for note in notes.notes if "from here on" in note] == [
        "2 bits from here on",
        "4 bits from here on",
    ]
    assert load(tmp_path / "whole" / "best.safetensors").revify_plan.stages[0].bits == 4
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe(images, tmp_path / "cut", **asked), InterruptAfter(cut_after))
    finetune(recipe(images, tmp_path / "cut", resume=True, **asked))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_with_random_signs_the_trained_model_is_the_plain_one(images: Path, tmp_path: Path) -> None:
    asked = {"calibrate": 8, "predictor": "diagonal", "bits": 2, "sign": "random"}
    result = finetune(recipe(images, tmp_path / "whole", **asked))
    assert result.outcome("converted").accuracy == result.outcome("reverted").accuracy
    assert load(tmp_path / "whole" / "best.safetensors").revify_plan.stages[0].sign == "random"
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe(images, tmp_path / "cut", **asked), InterruptAfter(1))
    finetune(recipe(images, tmp_path / "cut", resume=True, **asked))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("schedule", [((0, 2),), ((3, 2),), ((2, 1), (1, 0)), ((1, 9),)])
def test_schedules_that_make_no_sense(schedule: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(RevifyError, match="expected pairs"):
        Recipe(model="test_vit", epochs=3, bits_schedule=schedule)


class Notes(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
