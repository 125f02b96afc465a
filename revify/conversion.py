"""plan(), convert(), revert(): the whole story; enable() and disable() do the same to the model itself.

model ─observe, trace─▶ blocks ─▶ stages ─▶ Plan ─apply_plan─▶ converted model ─remove_plan─▶ plain model
                                             └─fit_plan─▶ Plan and fitted predictors ─▲
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple, Unpack

from torch import Tensor, nn

from revify.calibration.batches import Batch, Data, batches_of
from revify.calibration.calibrating import fit_plan
from revify.calibration.settling import RIDGE, TOLERANCE, Fitting, Progress
from revify.couplings.formulas import Formula
from revify.errors import RefusalError, RevifyError
from revify.methods import Method, Options
from revify.planning.inputs import Example, check_model, example_inputs
from revify.planning.making import make_plan
from revify.planning.refusals import instead
from revify.plans import Plan
from revify.rewriting.applying import apply_plan, install_plan, remove_plan, uninstall_plan
from revify.tables import group_reasons


def plan(
    model: nn.Module,
    example: Example = None,
    *,
    method: Method | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Say what `convert` would do to a model, without doing it.

    The analysis runs on a copy without data; the model stays as it is.

    Example:
        >>> import timm, revify
        >>> plan = revify.plan(timm.create_model("test_vit"))
        >>> [block.path for block in plan.stages[0].blocks][:2]
        ['blocks.0', 'blocks.1']

    Args:
        model: the model, which may be on any device.
        example: one batch of input, a tuple of positional inputs or a dictionary of keyword inputs; only shapes and
            types matter. Without it, two images of the size in the model's timm configuration.
        method: what is asked for, as one record: one of `revify.presets`, or your own.
        options: the same as keywords, which go before those of `method`: predictor, bits, sign, unit, grid, transitions,
            streams, coupling, step, stages, budget; see `Method`.

    Returns:
        The plan: stages, what is checkpointed, refusals, saved bytes. It prints as a table.

    Raises:
        RefusalError: the model is already converted, wrapped, compiled or checkpointed, or does not run on the example.
        RevifyError: an option is out of its range.
    """
    asked = Method.of(method, **options).settled(with_images=False)
    check_model(model)
    return make_plan(model, example_inputs(model, example), asked, foresees=True)


def convert(
    model: nn.Module,
    example: Example = None,
    *,
    plan: Plan | None = None,
    calibration: Data | None = None,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    ridge: float = RIDGE,
    trainable: bool = False,
    progress: Progress | None = None,
    method: Method | None = None,
    couplings: Iterable[Formula] = (),
    **options: Unpack[Options],
) -> nn.Module:
    """Make the residual stages of a model reversible, with a backward that stores no activations.

    The result has the same class, module paths, methods, hooks and state_dict keys, and shares parameters and buffers
    with the given model, which stays as it was. Train it as usual; `revert` gives the plain model back.

    Example:
        >>> import timm, torch, revify
        >>> model = revify.convert(timm.create_model("test_vit"))
        >>> model(torch.randn(2, 3, 160, 160)).sum().backward()

    Args:
        model: the plain model.
        example: as for `plan`; without it, two of the calibration images.
        plan: do exactly this plan; the other options are then those of the plan, but for what is fitted.
        calibration: images for `calibrate`, which fits the predictors; a batch [n, …], a dictionary of keyword inputs, or an
            iterable of batches, such as a DataLoader.
        rank: with calibration, as for `calibrate`, like the next four.
        tolerance: for bits="auto".
        ridge: 0 suits the network as it is best, the default what training makes of it.
        trainable: hold what was fitted as parameters.
        progress: called with a line of text now and then.
        method: as for `plan`.
        couplings: formulas of your own that a given plan names, if it was read from JSON, which keeps names only.
        options: as for `plan`; with images, predictor and bits are "auto" where nothing else is said.

    Returns:
        The converted model. Its plan is its attribute `revify_plan`.

    Raises:
        RefusalError: nothing in the model can be converted, or it is in a state in which it must not be.
        RevifyError: an option is out of its range.

    Reference:
        Gomez et al. 2017, "The Reversible Residual Network"; the coupling is that of docs/method.md.
    """
    plan = _with_couplings(plan, couplings) if plan else None
    fitting = Fitting(rank, tolerance, ridge, progress)
    asked = Method.of(method, **options).settled(with_images=calibration is not None)
    found = _settle(model, example, plan, calibration, asked, fitting, trainable=trainable)
    return apply_plan(model, found.plan, forecasts=found.forecasts, trainable=trainable)


def enable(
    model: nn.Module,
    example: Example = None,
    *,
    plan: Plan | None = None,
    calibration: Data | None = None,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    ridge: float = RIDGE,
    trainable: bool = False,
    progress: Progress | None = None,
    method: Method | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Convert a model in place: as `convert`, but the model itself is the converted one afterwards.

    Modules and parameters are the same objects as before, so whoever holds them already keeps what is right: optimizers,
    averages of weights, trainers, wrappers. `disable` undoes it. After an error the model is as it was.

    Example:
        >>> import timm, torch, revify
        >>> model = timm.create_model("test_vit")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> plan = revify.enable(model)
        >>> model(torch.randn(2, 3, 160, 160)).sum().backward()
        >>> optimizer.step()
        >>> revify.disable(model)

    Args:
        model: the plain model, not yet wrapped (DDP, FSDP, torch.compile come afterwards).
        example: as for `plan`, like all that follows as for `convert`.
        plan: do exactly this plan.
        calibration: images, to fit predictors.
        rank: with calibration, like the next four.
        tolerance: for bits="auto".
        ridge: of the fit.
        trainable: hold what was fitted as parameters; an optimizer that exists already does not know them.
        progress: called with a line of text now and then.
        method: as for `plan`.
        options: as for `plan`, but for streams="split", whose layers have parameters of their own.

    Returns:
        The plan, which the model carries as `revify_plan`.

    Raises:
        RefusalError: nothing in the model can be converted, or it is in a state in which it must not be.
        RevifyError: an option is out of its range.
    """
    asked = Method.of(method, **options).settled(with_images=calibration is not None)
    if asked.streams == "split" or (plan is not None and plan.is_split):
        raise RefusalError(
            f'{type(model).__name__}: streams="split" makes layers of half the width with parameters of their own, which '
            "nobody who holds the model's would know. Use revify.convert, and give the optimizer those of its result."
        )
    fitting = Fitting(rank, tolerance, ridge, progress)
    found = _settle(model, example, plan, calibration, asked, fitting, trainable=trainable)
    install_plan(model, found.plan, forecasts=found.forecasts, trainable=trainable)
    return found.plan


def disable(model: nn.Module) -> None:
    """Make the plain model of a converted one, in place: what `enable` did is undone, and what was trained stays.

    Example:
        >>> import timm, revify
        >>> model = timm.create_model("test_vit")
        >>> _ = revify.enable(model)
        >>> revify.disable(model)
        >>> hasattr(model, "revify_plan")
        False

    Args:
        model: a converted model, by `enable` or by `convert`.

    Raises:
        RefusalError: the model is not a converted one.
    """
    _check_converted(model)
    uninstall_plan(model)


def revert(model: nn.Module) -> nn.Module:
    """The plain model of a converted one, sharing its parameters and buffers.

    The converted model stays as it is. If nothing was trained, the plain model is bit for bit the one that was given to
    `convert`; after training it has the trained parameters and the plain architecture's function.

    Example:
        >>> import timm, revify
        >>> model = timm.create_model("test_vit")
        >>> plain = revify.revert(revify.convert(model))
        >>> plain.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight
        True

    Args:
        model: a converted model.

    Returns:
        The plain model.

    Raises:
        RefusalError: the model is not a converted one.
    """
    _check_converted(model)
    return remove_plan(model)


class _Settled(NamedTuple):
    """What is to be done to a model.

    Args:
        plan: with a stage, or something that is checkpointed.
        forecasts: what was fitted, by block path.
    """

    plan: Plan
    forecasts: dict[str, dict[str, Tensor]]


def _settle(
    model: nn.Module,
    example: Example,
    plan: Plan | None,
    calibration: Data | None,
    asked: Method,
    fitting: Fitting,
    *,
    trainable: bool,
) -> _Settled:
    check_model(model)
    batches = _batches(model, calibration, needless=trainable or fitting != Fitting())
    shown = batches[0].example if example is None and batches else example
    plan = plan or make_plan(model, example_inputs(model, shown), asked)
    if not (plan.stages or plan.checkpointed) or (batches and not plan.stages):
        raise _nothing_to_convert(model, plan)
    return _Settled(*fit_plan(model, plan, batches, asked, fitting)) if batches else _Settled(plan, {})


def _check_converted(model: nn.Module) -> None:
    """Refuse a model that cannot be made plain."""
    plan = getattr(model, "revify_plan", None)
    if not isinstance(plan, Plan):
        raise RefusalError(
            f"{type(model).__name__} is not a converted model, so there is nothing to revert. Pass the module that "
            "revify.convert returned; unwrap it first if it is inside of DDP or a compiled model (model.module, _orig_mod)."
        )
    if plan.is_split:
        raise RefusalError(
            f'{type(model).__name__} was converted with streams="split", which is another function with layers of half the '
            "width, so there is no plain model with its weights. The model that was given to convert is as it was."
        )


def _batches(model: nn.Module, calibration: Data | None, *, needless: bool) -> list[Batch]:
    if calibration is not None:
        return batches_of(model, calibration)
    if needless:
        raise RevifyError(
            "rank, tolerance, ridge, trainable and progress are for predictors that are fitted: give calibration=, too."
        )
    return []


def _with_couplings(plan: Plan, couplings: Iterable[Formula]) -> Plan:
    """A plan that was read from JSON with the formulas that it names."""
    couplings = tuple(couplings)
    return replace(plan, couplings=couplings) if couplings else plan


def _nothing_to_convert(model: nn.Module, plan: Plan) -> RefusalError:
    reasons = "; ".join(f"{paths}: {reason}" for reason, paths in list(group_reasons(plan.refusals).items())[:4])
    return RefusalError(
        f"{type(model).__name__} has no stage to convert: {reasons}. A stage is a run of at least two residual blocks of "
        f"the same shape. What to do: {instead(model.modules())}."
    )
