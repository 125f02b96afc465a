"""A container whose own forward adds, as its program: what stands in for its forward, with steps on the tape in it."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from revify.errors import RefusalError
from revify.reading.programs import Part, Program, read_program
from revify.runtime.apart import Opening
from revify.stage_plans import BlockPlan


class Programmed(Opening):
    """Stands in for the forward of a container: its operations, and steps where its plans have them.

    Args:
        module: the container.
        name: its path, for errors.
        program: of its forward.
    """

    def __init__(self, module: nn.Module, name: str, program: Program) -> None:
        super().__init__(module, name)
        self.program = program
        self.runs: dict[int, tuple[Any, ...]] = {}  # Any: steps of one kind or the other

    def on(self, module: nn.Module) -> Self:
        """The same for a copy of the container."""
        other = super().on(module)
        other.runs = {run: tuple(step.on(module) for step in steps) for run, steps in self.runs.items()}
        return other

    @property
    def plain_in_eval(self) -> bool:
        """Whether a container in eval mode is run as it was: as its steps say."""
        return all(step.plain_in_eval for steps in self.runs.values() for step in steps)

    def within(self, *args: Any, **kwargs: Any) -> Any:  # Any: the container's own signature
        """The program, with its steps."""
        return self.program(self.module, args, kwargs, self._step)

    def parts(self, run: int) -> tuple[Part, ...]:
        """The parts of the forward that are the steps of a run."""
        return tuple(part for part in self.program.parts if part.run == run)

    def _step(self, number: int, part: Part, z: Any, side: tuple[Any, ...]) -> Any:
        if part.run not in self.runs:
            return part(self.module, z, *side)
        place = number - next(n for n, other in enumerate(self.program.parts) if other.run == part.run)
        return self.runs[part.run][place].run(z, *side)


def programmed(container: nn.Module, block: BlockPlan) -> Programmed:
    """What stands in for the container's forward, to be given the steps of the block's run.

    Raises:
        RefusalError: the forward has other runs than when it was planned.
    """
    known = vars(container).get("forward")
    if isinstance(known, Programmed):
        return known
    program = read_program(container, block.inputs)
    found = 0 if program is None else sum(part.run == block.run for part in program.parts)
    if program is None or found != len(block.branch_bytes):
        raise RefusalError(
            f"the plan cuts the forward of {block.path or 'the model'} into {len(block.branch_bytes)} additions, but it has "
            f"{found}. The plan was made for another version of it: make one with revify.plan(model)."
        )
    return Programmed(container, block.path or "the forward of the model", program)
