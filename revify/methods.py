"""What is asked of a conversion, as one record that is checked when it is made and knows its own defaults."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast, get_args

from revify.errors import RevifyError
from revify.words import (
    CALIBRATED,
    FIXED,
    MAX_BITS,
    MAX_GRID,
    SHORT_GRID,
    SIGNS,
    Guard,
    PredictorName,
    SignName,
    StepName,
    Streams,
    Transitions,
    Unit,
)

if TYPE_CHECKING:
    from torch import Tensor

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*(|b|[kmgt]i?b)\s*", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** power for power, letter in enumerate("kmgt", 1) for i in ("", "i")
}
DEFAULT_BITS = {"coded": 8, "recurrence": 4}


class Options(TypedDict, total=False):
    """The fields of `Method` as keywords of `plan` and `convert`; None is as good as not given."""

    predictor: PredictorName | None
    bits: int | Literal["auto"] | None
    sign: SignName | None
    unit: Unit | None
    grid: int | Literal["auto"] | None
    transitions: Transitions | None
    streams: Streams | None
    coupling: Callable[..., tuple[Tensor, ...]] | None
    step: StepName | None
    stages: Sequence[str] | None
    guard: Guard | None
    budget: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a model is to be made reversible: what `plan` and `convert` take as keywords, or as `method=`.

    What is left None is chosen to go with the rest. Published methods are in `revify.presets`.

    Example:
        >>> import timm, revify
        >>> method = revify.Method(predictor="midpoint", bits=2)
        >>> model = revify.convert(timm.create_model("test_vit"), method=method)

    Args:
        predictor: of the previous stream value: identity (the default), midpoint, zero or output; those that are fitted to
            images are diagonal, lowrank, linear_z, linear, or auto, the richest that costs little (the default where
            there are images).
        bits: per element and step; each halves the change of the function. Coded steps have 2 to 8, by default 8; a
            recurrence has 0 to 8, by default 4. With images also auto, then the default: the fewest in each block that
            keep the model's output.
        sign: of γ = ±2^-bits: balanced, − + + − over the steps, so that changes of neighbours cancel (the default for
            identity with bits); positive (the default for all else); or random, for each sample and step in training,
            so that the change is zero on average, and the plain blocks in eval mode.
        unit: what one step is: block, or branch, which makes each residual addition of a pre-norm block a step of its
            own, so that only one branch's activations live at a time.
        grid: resolution q of the stream, 0 to 40: its values are multiples of 2^-q within ±2^(24-q), and beyond q = 20 in
            float64, within ±2^(53-q). By default auto: for each stage what holds its values and shows what its blocks
            add, from a run on the example; 12 where the model holds no data.
        transitions: what becomes of that which lies outside of the stages (stem, transitions, head): checkpoint runs it
            again, too, where that lowers the peak; keep leaves it to ordinary autograd, which is faster.
        streams: full, or split: the halves of the channels are the streams and the blocks' branches F and G are cut to
            half their channels (RevNet). That is another function, to be trained from scratch or distilled.
        coupling: for split streams, one of revify.couplings or a formula of your own; by default additive.
        step: how a step can be undone: coded (the default) holds the code of each block's update and leaves eval mode
            the plain model; recurrence couples each value with the one before, and is flat at 0 bits. What only one of
            them knows chooses it: a predictor, a sign, a grid, images, and 0 or 1 bits mean recurrence.
        stages: the paths of the modules that are to be blocks, or patterns of them such as blocks.*, each of which keeps
            the shape of what it is given; by default those that are found.
        guard: in what a second run must repeat the first: bits (the default), so that gradients which are not those of
            ordinary autograd are an error; or shapes, for kernels that do not repeat to the bit (cudnn.benchmark, atomic
            additions). Coded steps only: their stream is exact all the same, and gradients differ by what kernels differ.
        budget: the most memory that a training step may allocate at a time, beside parameters, their gradients and inputs:
            bytes, or a text such as 6GiB or 500MB; the plan is the fastest that fits. With min it is the one that needs
            least. Of blocks and of what lies outside of stages it may keep some, run some again and code the others.
        reference: where the method was published.
        differs: what the publication does that this does not, or the other way round.

    Raises:
        RevifyError: a value out of its range, or values that do not go together.
    """

    predictor: PredictorName | None = None
    bits: int | Literal["auto"] | None = None
    sign: SignName | None = None
    unit: Unit = "block"
    grid: int | Literal["auto"] = "auto"
    transitions: Transitions = "checkpoint"
    streams: Streams = "full"
    coupling: Callable[..., tuple[Tensor, ...]] | None = None
    step: StepName | None = None
    stages: Sequence[str] | None = None
    guard: Guard = "bits"
    budget: int | str | None = None
    reference: str = ""
    differs: str = ""

    def __post_init__(self) -> None:
        self._check_values()
        if self.streams == "split":
            self._check_split()
        elif self.coupling is not None:
            raise RevifyError('coupling= is for streams="split"; full streams have predictor= and bits= instead.')
        if self.is_fitted:
            self._check_fitted()
        if self.step == "coded":
            self._check_coded()
        if self.guard == "shapes" and self.first_step != "coded":
            raise RevifyError(
                'guard="shapes" is for coded steps: a recurrence has its stream from what runs again, so that what does not '
                'repeat to the bit would spoil it. Use step="coded".'
            )
        if self.budget is not None:
            self._check_budget()

    @classmethod
    def of(cls, method: Method | None = None, **options: Unpack[Options]) -> Method:
        """A method with these options, which go before those of the one that it starts from."""
        said: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        return replace(method or cls(), **said)

    @property
    def options(self) -> Options:
        """What it says that is not so by default, as keywords of `plan` and `convert`."""
        plain = Method()
        said = {name: getattr(self, name) for name in Options.__annotations__}
        return cast(Options, {name: value for name, value in said.items() if value != getattr(plain, name)})

    @property
    def is_fitted(self) -> bool:
        """Whether it takes images, to which predictors or bits are fitted."""
        return self.predictor == "auto" or self.predictor in CALIBRATED or self.bits == "auto"

    def settled(self, *, with_images: bool) -> Method:
        """The same, where it is known whether there are images: what is not said is then fitted to them.

        Raises:
            RevifyError: something is to be fitted, and there are no images.
        """
        if with_images:
            return replace(self, predictor=self.predictor or "auto", bits="auto" if self.bits is None else self.bits)
        if self.is_fitted:
            raise RevifyError(
                f"predictor={self.predictor!r}, bits={self.bits!r}: this is fitted on images. Pass some: convert(model, "
                "calibration=images)."
            )
        return self

    @property
    def first_step(self) -> StepName:
        """The step that goes with the rest."""
        if self.step is not None:
            return self.step
        said = self.predictor is not None or self.sign is not None or self.grid != "auto"
        return "recurrence" if said or self.is_fitted or self.streams == "split" or self.bits in (0, 1) else "coded"

    @property
    def first_predictor(self) -> str:
        """The predictor of a new plan; one that is fitted takes its place later."""
        return "identity" if self.predictor is None or self.is_fitted else self.predictor

    @property
    def first_bits(self) -> int:
        """The bits of a new plan; those that are fitted take their place later."""
        said = None if self.bits == "auto" or self.is_fitted else self.bits
        return DEFAULT_BITS[self.first_step] if said is None else said

    @property
    def first_sign(self) -> str:
        """The sign of γ in a new plan: what is fitted repairs the change of the function itself."""
        plain = not self.is_fitted and self.streams == "full"
        balances = plain and self.first_predictor == "identity" and self.first_bits > 0
        return self.sign or ("balanced" if balances else "positive")

    @property
    def bytes_allowed(self) -> int | Literal["min"] | None:
        """The budget in bytes, "min", or None.

        Raises:
            RevifyError: it is a text that says neither.
        """
        if self.budget is None or self.budget == "min" or (_is_whole(self.budget, 2**62)):
            return cast(int | Literal["min"] | None, self.budget)
        found = _SIZE.fullmatch(self.budget) if isinstance(self.budget, str) else None
        if found is None:
            raise RevifyError(
                f'budget={self.budget!r} is no size: give bytes, a text such as "6GiB", "500MB" or "1.5e9", or "min".'
            )
        return int(float(found[1]) * _UNITS[found[2].lower()])

    def _check_values(self) -> None:
        if self.stages is not None:
            named = () if isinstance(self.stages, str) else tuple(self.stages)
            if not named or not all(isinstance(name, str) and name for name in named):
                raise RevifyError(
                    f'stages={self.stages!r} names no modules: give a list of their paths, such as ["net.0", "net.1"], or '
                    'patterns of them, ["net.*"].'
                )
            object.__setattr__(self, "stages", named)
        known = (*FIXED, *CALIBRATED, "auto")
        if self.predictor is not None and self.predictor not in known:
            raise RevifyError(f"predictor={self.predictor!r} is not known: choose one of {', '.join(known)}.")
        if self.bits is not None and self.bits != "auto" and not _is_whole(self.bits, MAX_BITS):
            raise RevifyError(
                f"bits={self.bits!r} is no number of residue bits: give a whole number from 0 to {MAX_BITS}, or, with "
                'images to calibrate on, "auto".'
            )
        if self.grid != "auto" and not _is_whole(self.grid, MAX_GRID):
            raise RevifyError(
                f'grid={self.grid!r} is no resolution: give "auto" or a whole number q from 0 to {MAX_GRID}; values are then '
                f"multiples of 2^-q within ±2^(24-q), and beyond {SHORT_GRID} in float64, within ±2^(53-q)."
            )
        if self.sign is not None and self.sign not in SIGNS:
            raise RevifyError(f"sign={self.sign!r} is not known: choose one of {', '.join(SIGNS)}.")
        choices = {
            "unit": Unit,
            "transitions": Transitions,
            "streams": Streams,
            "step": StepName,
            "guard": Guard,
        }
        for name, words in choices.items():
            if getattr(self, name) not in (*get_args(words), None):
                either = " or ".join(f'"{word}"' for word in get_args(words))
                raise RevifyError(f"{name}={getattr(self, name)!r} is not known: choose {either}.")

    def _check_coded(self) -> None:
        if replace(self, step=None).first_step != "coded" or self.bits in (0, 1):
            raise RevifyError(
                'step="coded" has 2 to 8 bits and no predictor, sign, grid, images or split streams: these belong to '
                'step="recurrence". Leave one out.'
            )

    def _check_budget(self) -> None:
        if self.bytes_allowed != "min" and int(self.bytes_allowed or 0) <= 0:
            raise RevifyError(f"budget={self.budget!r}: a training step needs memory. Give a number of bytes above 0.")
        if self.streams == "split" or self.is_fitted:
            raise RevifyError(
                "budget= is for full streams without images: what is split, or fitted, is another function at each budget. "
                "Leave one out."
            )

    def _check_split(self) -> None:
        if self.is_fitted:
            raise RevifyError(
                'streams="split" has no predictor to calibrate: it is trained from scratch or distilled. Leave one out.'
            )
        if (self.predictor, self.bits, self.unit, self.sign) != (None, None, "block", None):
            raise RevifyError(
                'predictor, bits, unit and sign are for full streams: with streams="split" choose a coupling instead.'
            )

    def _check_fitted(self) -> None:
        if self.predictor in FIXED:
            raise RevifyError(
                f"predictor={self.predictor!r} cannot be calibrated: choose auto, {', '.join(CALIBRATED)}, or give a number "
                "of bits."
            )
        if self.unit == "branch":
            raise RevifyError(
                'unit="branch" is for fixed predictors: predictors are fitted to whole blocks. Leave one out.'
            )
        if self.sign == "balanced":
            raise RevifyError(
                'sign="balanced" is for fixed predictors: what is fitted repairs the change itself. Leave one out.'
            )


def _is_whole(value: object, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest
