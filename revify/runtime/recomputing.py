"""Checkpointing of what lies between the stages: the module's input is kept, and it runs again in backward.

It is the runtime's rerun without a stream, so it has the runtime's manners: BatchNorm counts once, the random numbers
repeat, autograd's graph is real, and what the second run saves or hands on is compared with the first. Modules that are
called one after the other share a checkpoint: a `Section` rides on what one returns, and the next one joins it if that is what
it is given, as it was returned. The second run of the last one ends at its last saved tensor: nobody needs its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revify.errors import StreamError
from revify.runtime.conditions import drop_weight_copies
from revify.runtime.fingerprints import checksum, comparable
from revify.runtime.guards import Repeats
from revify.runtime.links import Rider
from revify.runtime.randomness import Draws, own_numbers
from revify.runtime.replay import SideInputs, version
from revify.runtime.reruns import Rerun
from revify.runtime.standing_in import StandIn
from revify.runtime.states import Habits
from revify.runtime.tape import saves_nothing


class Section(Rider):
    """One forward pass through modules that are called one after the other; it holds what the first was given.

    Attributes:
        following: the path of the module that may come next, None behind the last.
        version: of the value that it rides on.
        draws: keeps the random states of its modules.
    """

    def __init__(self) -> None:
        self.following: str | None = None
        self.version = 0
        self.draws = Draws()
        self._reruns: list[Rerun] = []
        self._outputs: list[Tensor | None] = []  # checksums of what was handed on, where it is compared
        self._repeats = Repeats()

    def append(self, rerun: Rerun, given: Tensor | None, *, compares: bool) -> None:
        """A module is about to run: on what the last one returned, or first of all, on inputs of its own."""
        if given is not None:
            self._outputs.append(checksum(given) if compares else None)
        self._reruns.append(rerun)

    def load(self) -> None:
        """Run all modules again, each on what the one before it gives, for their saved tensors."""
        with torch.no_grad():
            values: tuple[Tensor, ...] = ()
            for number, rerun in enumerate(self._reruns):
                handed_on = number < len(self._outputs)
                output = rerun.again(*values, catch=True, outputs=handed_on)
                before = self._outputs[number] if handed_on else None
                self._repeats.note(rerun.name, None if before is None else checksum(output) != before, *rerun.differs)
                values = (output,)
        self._repeats.check_in_the_end()


class Checkpointed(StandIn):
    """Stands in for the forward of a module between the stages.

    Args:
        module: the module, as it was.
        name: its path, for errors.
        following: the path of the module that shares its checkpoint and comes next, None where there is none.
        joins: whether it shares the checkpoint of a module before it; called by itself it is left to ordinary autograd.
        compares: whether its second run must repeat the first to the bit.
    """

    def __init__(
        self, module: nn.Module, name: str, following: str | None = None, *, joins: bool = False, compares: bool = True
    ) -> None:
        super().__init__(module, name)
        self.following, self.joins, self.compares = following, joins, compares
        self._habits = Habits()

    def run(self, *args: Any, **kwargs: Any) -> Any:  # Any: the module's own signature
        values = (*args, *kwargs.values())
        with own_numbers(draws=self.module.training):
            output = self._recorded(args, kwargs) if saves_nothing(*values) else self.plain(*args, **kwargs)
        drop_weight_copies(next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu")))
        return output

    def _exported(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        section = self._section(args, kwargs)
        if section is None and self.joins:  # the module before it was replaced, or left out: nobody keeps its input
            return self.plain(*args, **kwargs)
        side = SideInputs.of(args if section is None else args[1:], kwargs)
        device = next((t.device for t in (*side.tensors(), *args) if isinstance(t, Tensor)), None)
        if device is None:
            raise StreamError(f"{self.name} was called without a tensor, so there is nothing to checkpoint it from.")
        given = None if section is None else args[0]
        section = section or Section()
        rerun = Rerun(
            self.name, self.plain, self.module, side, self._habits, section.draws, exact=self.compares, seen=False
        )
        section.append(rerun, given, compares=self.compares)
        output = rerun.first(lambda: self.plain(*args, **kwargs), device, section.load)
        if self.following and comparable(output):
            section.following, section.version = self.following, version(output)
            output.revify_section = section
        return output

    def _section(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Section | None:
        """The one that the module joins; None where its first argument is not just what the module before it returned."""
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        found = [value.__dict__.pop("revify_section", None) for value in values]
        if not args or not isinstance(args[0], Tensor) or not found[0]:
            return None
        section: Section = found[0]
        return section if (section.following, section.version) == (self.name, version(args[0])) else None
