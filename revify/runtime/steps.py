"""A block of a stage as a step of the recurrence: what stands in for its forward.

    z[k], z[k-1] ── T, q ──▶ z[k+1] = T(z[k]) + γ (z[k-1] − q(z[k]))

A step finds its tape by the tensor that it is given (`links`), and leaves everything that belongs to the pass there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from revify.runtime.arguments import pick_stream, split_stream, with_stream
from revify.runtime.coded import CodedStep
from revify.runtime.conditions import drop_weight_copies
from revify.runtime.fingerprints import checksum
from revify.runtime.grid import Gap, Join, OnGrid, Resume, Sign, balanced_sign, random_signs, stream_dtype
from revify.runtime.links import Link, leave_link, take_link
from revify.runtime.predictors import Predictor
from revify.runtime.randomness import own_numbers
from revify.runtime.replay import SideInputs, version
from revify.runtime.reruns import Rerun
from revify.runtime.standing_in import StageStep, StandIn
from revify.runtime.tape import Entry, StageRule, Tape, saves_nothing
from revify.runtime.torch_internals import is_autocast
from revify.runtime.views import with_views, without_views


class Step(StageStep[StageRule]):
    """Stands in for a block whose stage is a recurrence; the first step is the ordinary block, T alone.

    Args:
        predictor: q.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: StageRule,
        index: int,
        stream: int | str = 0,
        transform: Callable[..., Any] | None = None,
        result: int | None = None,
        *,
        predictor: Predictor,
    ) -> None:
        super().__init__(module, rule, index, stream, transform, result)
        self.predictor = predictor

    def on(self, module: nn.Module) -> Self:
        """The same for a copy of the block."""
        other = super().on(module)
        other.predictor = self.predictor.on(module)
        return other

    def run(self, *args: Any, **kwargs: Any) -> Any:  # Any: side inputs and results of every type pass through
        if self.rule.sign == "random" and not self.module.training:
            return self._plain(args, kwargs)
        x, side = split_stream(self.stream, self.name, args, kwargs)
        tape, z, older = self._take(x)
        branch_dtype = stream_dtype(x.dtype) if is_autocast(x.device.type) else x.dtype
        kept = without_views(side, x, z) if older is not None else side
        value, others = self._step(tape, z, older, side, kept, branch_dtype)
        drop_weight_copies(x.device)
        visible = value.to(branch_dtype)
        if not self.last:
            newest = None if visible is value else value
            visible.revify_link = Link(tape, self.index + 1, z, newest, version(visible))  # type: ignore[attr-defined]
        else:
            tape.check_range()
            visible = visible.clone() if self.rule.copied and visible is value else visible
        if self.result is None:
            return visible
        return (*others[: self.result], visible, *others[self.result :])

    @property
    def plain_in_eval(self) -> bool:
        """Whether a block in eval mode is run as it was: with random signs."""
        return self.rule.sign == "random"

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """T alone, under ordinary autograd; if the next block trains (some are frozen), its stream begins anew."""
        x, _ = split_stream(self.stream, self.name, args, kwargs)
        leave_link(x)
        outputs = self.transformed(*args, **kwargs)
        value = outputs if self.result is None else outputs[self.result]
        if not self.last and isinstance(value, Tensor):
            link = Link(Tape(self.rule), self.index + 1, None, None, version(value))
            value.revify_link = link  # type: ignore[attr-defined]
        return outputs

    def _take(self, x: Tensor) -> tuple[Tape, Tensor, Tensor | None]:
        """The tape of this forward pass, z[k] and z[k-1]."""
        link = take_link(x, self.rule, self.index)
        if link is None or link.older is None:
            tape = Tape(self.rule)
            if saves_nothing(x):
                tape.enter(x)
            return tape, OnGrid.apply(x, self.rule.grid), None
        assert isinstance(link.tape, Tape)  # a rule belongs to steps only
        tape = link.tape if link.tape.continues(link.index - 1) else Tape(self.rule)
        return tape, x if link.newest is None else Resume.apply(x, link.newest), link.older

    def _step(
        self,
        tape: Tape,
        z: Tensor,
        older: Tensor | None,
        side: tuple[Any, ...],
        kept: tuple[Any, ...],
        branch_dtype: torch.dtype,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """z[k+1] from z[k] and z[k-1], recorded on the tape where a backward may come, and the block's other results."""
        args, kwargs = side
        coupled = older is not None
        sign = self._sign(z) if coupled else None
        recorded = saves_nothing(z)
        numbers = own_numbers(draws=self.module.training)
        if recorded:
            again = SideInputs.of((None, None, coupled, branch_dtype, *kept[0]), kept[1])
            rerun = Rerun(self.name, self._branch, self.module, again, self.habits, tape.draws)
            entry = Entry(self.index, coupled, self, rerun, z.requires_grad, z.stride(), checksum(z), sign)
            place = tape.append(z, entry)
            with numbers:
                gap, t, late, others = rerun.first(
                    lambda: self._branch(z, older, sign, coupled, branch_dtype, *args, **kwargs),
                    z.device,
                    partial(tape.load, place),
                )
        else:
            with numbers:
                gap, t, late, others = self._branch(z, older, sign, coupled, branch_dtype, *args, **kwargs)
        value, residue = t, None
        if coupled:
            value, residue = Join.apply(t, gap, late, self.rule.bits[self.index], self.rule.grid, sign, recorded)
        if recorded:
            if coupled:
                tape.observe(self.index, gap)
            if coupled and late is not None:
                tape.observe(self.index, gap.detach() - late.detach())
            tape.observe(self.index, value)
            tape.advance(t, value, residue)
        return value, others

    def _sign(self, z: Tensor) -> Sign:
        if self.rule.sign == "random":
            return random_signs(z)
        return balanced_sign(self.index, self.rule.pattern) if self.rule.sign == "balanced" else None

    def _branch(
        self,
        z: Tensor,
        older: Tensor | None,
        sign: Sign,
        coupled: bool,
        branch_dtype: torch.dtype,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
        """u = z[k-1] − a(z[k]), or a(z[k]) alone where z[k-1] is what is sought; T(z[k]); c(T(z[k])); the rest."""
        forecast = self.predictor.before(z) if coupled else z
        if older is not None:
            forecast = Gap.apply(older, forecast, self.rule.bits[self.index], sign)
        if isinstance(self.stream, int):
            args = (*args[: self.stream], z.to(branch_dtype), *args[self.stream + 1 :])
        else:
            kwargs = {**kwargs, self.stream: z.to(branch_dtype)}
        args, kwargs = with_views((args, kwargs), z)
        before = version(z)
        outputs = self.transformed(*args, **kwargs)
        outputs, others = pick_stream(self.name, outputs, self.result, z, before)
        t = OnGrid.apply(outputs, self.rule.grid)
        return forecast, t, self.predictor.after(t) if coupled else None, others

    def parts_again(self, entry: Entry, z: Tensor, *, catch: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """a(z[k]), T(z[k]) and c(T(z[k])) once more, without a graph."""
        forecast, t, late, _ = entry.rerun.again(z.detach().requires_grad_(entry.needs_grad), catch=catch)
        return forecast.detach(), t.detach(), None if late is None else late.detach()


class Steps(StandIn):
    """Stands in for the forward of a block that is cut into branches: one step for each.

    Args:
        module: the block.
        steps: in order.
    """

    def __init__(self, module: nn.Module, steps: tuple[Step, ...] | tuple[CodedStep, ...]) -> None:
        super().__init__(module, steps[0].name)
        self.steps = steps

    def on(self, module: nn.Module) -> Self:
        """The same for a copy of the block."""
        other = super().on(module)
        other.steps = tuple(step.on(module) for step in self.steps)  # type: ignore[assignment]  # of the same kind
        return other

    @property
    def plain_in_eval(self) -> bool:
        """Whether a block in eval mode is run as it was: as its steps say."""
        return self.steps[0].plain_in_eval

    def run(self, *args: Any, **kwargs: Any) -> Tensor:  # Any: side inputs of every type pass through
        """All steps."""
        stream = self.steps[0].stream
        z: Tensor = self.steps[0].run(*args, **kwargs)
        for step in self.steps[1:]:
            args, kwargs = with_stream(stream, z, args, kwargs)
            z = step.run(*args, **kwargs)
        return z
