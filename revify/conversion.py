"""plan(), convert(), revert(): the whole story.

model ─observe, trace─▶ blocks ─▶ stages ─▶ Plan ─apply_plan─▶ converted model ─remove_plan─▶ plain model
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, TypedDict, cast

from torch import Tensor, nn

from revify.calibration.calibrating import calibrate
from revify.couplings.formulas import Formula
from revify.couplings.shipped import additive
from revify.errors import RefusalError, RevifyError
from revify.planning.inputs import Example, check_model, check_options, check_streams, example_inputs
from revify.planning.making import make_plan
from revify.plans import Plan
from revify.rewriting.applying import apply_plan, remove_plan
from revify.runtime.predictors import CALIBRATED
from revify.tables import group_reasons

DEFAULT_BITS = 4
DEFAULT_GRID = 12

PredictorName = Literal["identity", "midpoint", "zero", "output"]
Unit = Literal["block", "branch"]
Transitions = Literal["keep", "checkpoint"]
Streams = Literal["full", "split"]
SignName = Literal["positive", "balanced", "random"]


def plan(
    model: nn.Module,
    example: Example = None,
    *,
    predictor: PredictorName = "identity",
    bits: int = DEFAULT_BITS,
    grid: int = DEFAULT_GRID,
    transitions: Transitions = "checkpoint",
    sign: SignName | None = None,
    unit: Unit = "block",
    streams: Streams = "full",
    coupling: Formula = additive,
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
        predictor: of the previous stream value from the current one.
        bits: residue bits per element and step, 0…8: each costs b/8 byte and halves the change of the function.
        grid: resolution q; stream values are multiples of 2^-q within ±2^(24-q).
        transitions: "checkpoint" also runs again what lies outside of the stages (stem, transitions, head), where that
            lowers the peak; "keep" leaves it to ordinary autograd, which is faster.
        unit: "branch" makes each residual addition of a pre-norm block a step of its own, so that only one branch's
            activations live at a time; with predictor="identity" and bits=0 this is Rev-ViT. "block": whole blocks.
        sign: of γ = ±2^-bits. "balanced": + − − + + − − … over the blocks, so that changes of neighbours cancel, the
            default for "identity" with bits; "positive": the default for all else; "random": for each sample and step
            in training, so that the change is zero on average, and the plain blocks in eval mode (BDIA, Zhang et al.
            2025, with midpoint and one bit).
        streams: "split" makes the two halves of the channels the streams, and the blocks' branches F and G, cut to half
            their input and output channels, or lifted where they cannot be cut (the plan says which). This is another
            function with weights of its own, to be trained from scratch or distilled: RevNet. It has no predictor,
            bits or unit, and no `revert`.
        coupling: for streams="split", one of `revify.couplings` or your own formula.

    Returns:
        The plan: stages, what is checkpointed, refusals, saved bytes. It prints as a table.

    Raises:
        RefusalError: the model is already converted, wrapped, compiled or checkpointed, or does not run on the example.
        RevifyError: an option is out of its range.
    """
    check_options(predictor, bits, grid, transitions, sign)
    if unit not in ("block", "branch"):
        raise RevifyError(f'unit={unit!r} is not known: choose "block" or "branch".')
    check_streams(streams, coupling, plain=(predictor, bits, unit, sign) == ("identity", DEFAULT_BITS, "block", None))
    check_model(model)
    made = make_plan(
        model,
        example_inputs(model, example),
        bits=bits,
        predictor=predictor,
        grid=grid,
        transitions=transitions,
        unit=unit,
        coupling=coupling if streams == "split" else None,
    )
    if streams == "split":
        return made
    sign = sign or ("balanced" if predictor == "identity" and bits > 0 else "positive")
    return replace(made, stages=tuple(replace(stage, sign=sign) for stage in made.stages))


def convert(
    model: nn.Module,
    example: Example = None,
    *,
    plan: Plan | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    predictor: PredictorName | None = None,
    bits: int | Literal["auto"] | None = None,
    grid: int = DEFAULT_GRID,
    transitions: Transitions = "checkpoint",
    sign: SignName | None = None,
    unit: Unit = "block",
    streams: Streams = "full",
    coupling: Formula = additive,
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
        example: as for `plan`; without it, where the calibration images are one batch, two of them.
        plan: do exactly this plan; the other options are then those of the plan.
        calibration: images for `calibrate`, which fits the predictors; a batch [n, …] or an iterable of batches.
        predictor: "identity" (the default) or "midpoint"; with calibration one of `calibrate`'s, by default "auto".
        bits: residue bits per element and step, 0…8, by default 4; with calibration also "auto", then the default: the
            fewest in each block that keep the model's output.
        grid: as for `plan`.
        transitions: as for `plan`.
        sign: as for `plan`; with calibration "positive" (the default) or "random".
        unit: as for `plan`; "branch" not with calibration.
        streams: as for `plan`; "split" not with calibration. Layers that are cut have parameters of their own.
        coupling: as for `plan`.

    Returns:
        The converted model. Its plan is its attribute `revify_plan`.

    Raises:
        RefusalError: nothing in the model can be converted, or it is in a state in which it must not be.
        RevifyError: an option is out of its range.

    Reference:
        Gomez et al. 2017, "The Reversible Residual Network"; the coupling is that of docs/method.md.
    """
    check_model(model)
    if calibration is not None and (unit == "branch" or (plan is not None and plan.is_cut)):
        raise RevifyError(
            'unit="branch" is for fixed predictors: predictors are fitted to whole blocks. Leave one out.'
        )
    if calibration is not None and (streams == "split" or (plan is not None and plan.is_split)):
        raise RevifyError(
            'streams="split" has no predictor to calibrate: it is trained from scratch or distilled. Leave one out.'
        )
    if calibration is not None and sign == "balanced":
        raise RevifyError(
            'sign="balanced" is for fixed predictors: what is fitted repairs the change itself. Leave one out.'
        )
    fixed = _fixed_options(calibration is not None, predictor, bits)
    if plan is None:
        if example is None and isinstance(calibration, Tensor):
            example = calibration[:2]
        plan = _plan(
            model,
            example,
            **fixed,
            grid=grid,
            transitions=transitions,
            sign=sign,
            unit=unit,
            streams=streams,
            coupling=coupling,
        )
    if not plan.stages:
        reasons = "; ".join(f"{paths}: {reason}" for reason, paths in list(group_reasons(plan.refusals).items())[:4])
        raise RefusalError(
            f"{type(model).__name__} has no stage to convert: {reasons}. A stage is a run of at least two residual blocks of "
            "the same shape. Use gradient checkpointing for this model, or a residual one."
        )
    converted = apply_plan(model, plan)
    if calibration is None:
        return converted
    return calibrate(converted, calibration, predictor=predictor or "auto", bits=bits if bits is not None else "auto")


class _Fixed(TypedDict):
    predictor: PredictorName
    bits: int


def _fixed_options(calibrated: bool, predictor: str | None, bits: int | str | None) -> _Fixed:
    """What the plan starts from: a calibration sets its own predictors and bits."""
    if calibrated:
        return {"predictor": "identity", "bits": DEFAULT_BITS}
    if predictor in CALIBRATED or predictor == "auto" or bits == "auto":
        raise RevifyError(
            f"predictor={predictor!r}, bits={bits!r}: this is fitted on images. Pass some: convert(model, calibration=images)."
        )
    return cast(_Fixed, {"predictor": predictor or "identity", "bits": DEFAULT_BITS if bits is None else bits})


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
    return remove_plan(model)


_plan = plan  # `convert` has an argument of this name
