"""Every timm architecture → converted and checked, or refused with a reason.

    survey   every entrypoint is built without data: family, structure (file, class, classes of its modules), size
    plans    `revify.plan` for the smallest model of each structure (--all: for every entrypoint)
    checks   for each of those with stages, at a reduced image size: one training step, gradients bit for bit those of
             ordinary autograd on the converted model, the same state_dict keys, a reverted model that is identical
    page     docs/coverage.md

Each part appends to its own results/coverage*.csv and skips what stands there, so that an interrupted sweep goes on
where it was; --again PATTERN removes rows first. Exit status 1 if a plan crashed or a check failed.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from coverage_page import BOUNDS, write_page
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import revify
from revify.tables import group_reasons

RESULTS = Path(__file__).parent / "results"
SURVEY = ("name", "family", "kind", "structure", "parameters")
PLANS = (
    *("name", "family", "structure", "stages", "blocks", "share", "removed", "outside", "removed_all"),
    *("status", "reason", "seconds"),
)  # fmt: skip
CHECKS = ("name", "family", "structure", "size", "stages", "blocks", "status", "reason", "seconds")
SIZES = (64, 96, 128, 160, 192, 224, 256)
PLAN_SECONDS, CHECK_SECONDS = 60, 300
DEEP = 20_000_000  # parameters from which a model is made shallower, where it has an argument for that
LARGEST = 300_000_000  # parameters of a model that is run
DEPTHS = (
    {"depth": 4},
    {"depths": (2, 2, 2, 2)},
    {"depths": (1, 2, 2, 1)},
    {"layers": (2, 2, 2, 2)},
    {"layers": (1, 2, 2, 1)},
)
FINEST = 20  # grid
NOT_FINITE = "ordinary autograd's gradients are not finite"
Row = dict[str, Any]


class Sheet:
    """A CSV file to which rows are appended; rows that stand in it are not made again."""

    def __init__(self, name: str, columns: tuple[str, ...]) -> None:
        self.path, self.columns = RESULTS / f"{name}.csv", columns
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self.rows: dict[str, Row] = {row["name"]: row for row in csv.DictReader(file)}
        else:
            self.rows = {}
            self._write()

    def drop(self, pattern: str) -> None:
        self.rows = {n: r for n, r in self.rows.items() if not _matches(r, pattern)}
        self._write()

    def add(self, row: Row) -> None:
        self.rows[row["name"]] = {key: str(value) for key, value in row.items()}
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def _write(self) -> None:
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    RESULTS.mkdir(exist_ok=True)
    survey = Sheet("coverage_survey", SURVEY)
    plans, checks = Sheet("coverage", PLANS), Sheet("coverage_checks", CHECKS)
    for pattern in arguments.again:
        for part, sheet in (("plans", plans), ("checks", checks)):
            if part in arguments.parts:
                sheet.drop(pattern)
    names = timm.list_models()
    _sweep("survey", survey, names, _survey)
    chosen = representatives(list(survey.rows.values()))
    wanted = [n for n in (names if arguments.all else sorted({*chosen, *BOUNDS})) if fnmatch.fnmatch(n, arguments.only)]
    if "plans" in arguments.parts:
        _sweep("plans", plans, wanted, lambda name: {**_about(survey.rows[name]), **_planned(name)})
    runnable = [n for n in chosen if n in wanted and plans.rows.get(n, {}).get("status") == "converted"]
    runnable.sort(key=lambda n: int(survey.rows[n]["parameters"]))
    if "checks" in arguments.parts:
        _sweep(
            "checks", checks, runnable, lambda n: {**_about(survey.rows[n]), **_checked(survey.rows[n], plans.rows[n])}
        )
    figures = write_page(survey.rows, plans.rows, checks.rows, chosen)
    print(figures)
    bad = [r for r in (*plans.rows.values(), *checks.rows.values()) if r["status"] in ("crash", "failed")]
    for row in bad:
        print(f"{row['status']}: {row['name']}: {row['reason']}")
    return int(bool(bad))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="plan every entrypoint, not one of each structure")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to plan and check")
    parser.add_argument("--again", nargs="*", default=[], metavar="PATTERN", help="names, families or statuses")
    parser.add_argument("--parts", nargs="+", default=["plans", "checks"], choices=["plans", "checks"])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def representatives(survey: list[Row]) -> list[str]:
    """The smallest model of each structure, by name."""
    best: dict[str, Row] = {}
    for row in sorted(survey, key=lambda row: (int(row["parameters"]), row["name"])):
        best.setdefault(row["structure"], row)
    return sorted(row["name"] for row in best.values())


def _sweep(what: str, sheet: Sheet, names: list[str], work: Callable[[str], Row]) -> None:
    missing = [name for name in names if name not in sheet.rows]
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not missing) as bar:
        task = bar.add_task(what, total=len(missing))
        for name in missing:
            bar.update(task, description=f"{what} {name}")
            start = time.perf_counter()
            row = {"name": name, **work(name)}
            if "seconds" in sheet.columns:
                row.setdefault("seconds", round(time.perf_counter() - start, 2))
            sheet.add(row)
            bar.advance(task)


def _about(row: Row) -> Row:
    return {key: row[key] for key in ("family", "structure")}


def _survey(name: str) -> Row:
    """What a model is made of; two models are of one structure if file, class and classes of modules agree."""
    model = _on_meta(name)
    family = type(model).__module__.rpartition(".")[2]
    classes = sorted({f"{type(m).__module__}.{type(m).__name__}" for m in model.modules()})
    text = " ".join((family, type(model).__name__, *classes))
    return {
        "family": family,
        "kind": type(model).__name__,
        "structure": hashlib.sha1(text.encode()).hexdigest()[:10],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def _planned(name: str) -> Row:
    row: Row = {"stages": 0, "blocks": 0, "share": 0, "removed": 0, "outside": 0, "removed_all": 0, "reason": ""}
    try:
        model = _on_meta(name)
        start = time.process_time()  # of one thread: what others do on the machine does not count
        with _limit(PLAN_SECONDS):
            plan = revify.plan(model, transitions="checkpoint")
        seconds = round(time.process_time() - start, 3)
    except revify.RefusalError as error:
        return {**row, "status": "refused", "reason": _one_line(error)}
    except Exception as error:
        return {**row, "status": "crash", "reason": _one_line(error)}
    reasons = "; ".join(f"{paths}: {reason}" for reason, paths in group_reasons(plan.refusals).items())
    return {
        "stages": len(plan.stages),
        "blocks": sum(len(stage.blocks) for stage in plan.stages),
        "share": round(plan.stage_share, 4),
        "removed": round(1 - replace(plan, checkpointed=()).predicted_bytes / max(plan.saved_bytes, 1), 4),
        "outside": round(sum(c.saved_bytes - c.input_bytes for c in plan.checkpointed) / max(plan.saved_bytes, 1), 4),
        "removed_all": round(1 - plan.predicted_bytes / max(plan.saved_bytes, 1), 4),
        "status": "converted" if plan.stages else "refused",
        "reason": reasons,
        "seconds": seconds,
    }


def _checked(about: Row, plan: Row) -> Row:
    """One training step of a converted model against its oracle; on a larger image where batch norms divide by nothing."""
    row: Row = {"size": "", "stages": 0, "blocks": 0, "reason": ""}
    try:
        with _limit(CHECK_SECONDS):
            for smallest in (0, 160):
                kwargs, shape = reduced(about["name"], int(plan["stages"]), int(about["parameters"]), smallest)
                depth = "".join(f" {k}={v}" for k, v in kwargs.items() if k in ("depth", "depths", "layers"))
                row["size"] = "x".join(map(str, shape)) + depth
                parameters = sum(p.numel() for p in _on_meta(about["name"], **kwargs).parameters())
                if parameters > LARGEST:
                    return {**row, "status": "too large", "reason": f"{parameters:,} parameters"}
                torch.manual_seed(0)
                model, images = timm.create_model(about["name"], **kwargs).train(), torch.randn(2, *shape)
                try:
                    found = check(model, images)
                except revify.GridRangeError as error:  # fresh weights with a tiny stream: what the error advises
                    found = check(model, images, grid=FINEST)
                    found["reason"] = "; ".join(
                        filter(None, (found["reason"], f"with grid={FINEST}: {_one_line(error)}"))
                    )
                if NOT_FINITE not in found["reason"]:
                    break
        return {**row, **found}
    except Timeout:
        return {**row, "status": "slow", "reason": f"over {CHECK_SECONDS} s"}
    except Exception as error:
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {_one_line(error)}"}


def reduced(name: str, stages: int, parameters: int = 0, smallest: int = 0) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments and an input shape that make the model run on a small image, with as many stages as it has otherwise.

    Large models are made shallower too, and may then have fewer stages.
    """
    full: tuple[int, ...] = tuple(_on_meta(name).pretrained_cfg["input_size"])
    trials = [
        ({**depth, **size}, side, 1) for depth in DEPTHS for side in SIZES[:3] for size in ({"img_size": side}, {})
    ]
    trials = trials if parameters > DEEP else []
    trials += [(size, side, stages) for side in SIZES for size in ({"img_size": side}, {})]
    for kwargs, side, least in trials:
        if not smallest <= side < full[-1]:
            continue
        shape = (full[0], side, side)
        try:
            small = _on_meta(name, **kwargs)
            if len(revify.plan(small, torch.empty(2, *shape, device="meta")).stages) >= least:
                return _with_drops(name, kwargs), shape
        except Exception:  # whatever a model does with what it does not take
            continue
    return _with_drops(name, {}), full


def _with_drops(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Stochastic depth too, where the model takes it: its random numbers must repeat."""
    try:
        _on_meta(name, **kwargs, drop_path_rate=0.2)
    except Exception:  # not an argument of every model
        return kwargs
    return {**kwargs, "drop_path_rate": 0.2}


def check(model: nn.Module, images: Tensor, **options: Any) -> Row:
    """Convert; compare gradients with plain backward bit for bit, names of the state, and the reverted model."""
    converted = revify.convert(model, images, **options)
    plan = converted.revify_plan
    row: Row = {"stages": len(plan.stages), "blocks": sum(len(s.blocks) for s in plan.stages)}
    expected, found = (_gradients(converted, images, plain) for plain in (True, False))
    learnt = [g for n, g in expected.items() if not n.startswith("buffer ")]  # a buffer may be an infinite bound
    problems = [] if all(g.isfinite().all() for g in learnt) else [NOT_FINITE]
    different = [n for n in expected if n not in found or not torch.equal(expected[n], found[n])]
    if different or expected.keys() != found.keys():
        problems.append(f"{len(different)} of {len(expected)} gradients differ, first {different[:1]}")
    if not any(n for n, g in expected.items() if g.any()):
        problems.append("no gradient at all")
    if list(model.state_dict()) != list(converted.state_dict()):
        problems.append("other state_dict keys")
    reverted = revify.revert(converted)
    outputs = []
    for one in (model, reverted):
        one.eval()
        torch.manual_seed(2)
        with torch.no_grad():
            outputs.append(_flat(one(images)))
    if not all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)) or _classes(model) != _classes(reverted):
        problems.append("the reverted model is another one")
    return {**row, "status": "failed" if problems else "passed", "reason": "; ".join(problems)}


def _gradients(model: nn.Module, images: Tensor, plain: bool) -> dict[str, Tensor]:
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    x = images.clone().requires_grad_()
    torch.manual_seed(1)
    with revify.plain_backward() if plain else nullcontext():
        outputs = _flat(model(x))
        sum((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum() for y in outputs).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    gradients |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    gradients["input"] = x.grad if x.grad is not None else torch.zeros(0)
    with torch.no_grad():
        for n, b in model.named_buffers():
            if b.shape == buffers[n].shape:  # some models make a table at their first call
                b.copy_(buffers[n])
    return gradients


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [t for item in items for t in _flat(item)]


def _classes(model: nn.Module) -> list[str]:
    return [
        f"{path} {type(m).__name__}{' replaced' if 'forward' in vars(m) else ''}" for path, m in model.named_modules()
    ]


class Timeout(BaseException):
    """A model took too long; no `except Exception` on the way may catch it."""


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Timeout

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _matches(row: Row, pattern: str) -> bool:
    return any(fnmatch.fnmatch(row[key], pattern) for key in ("name", "family", "status"))


if __name__ == "__main__":
    sys.exit(main())
