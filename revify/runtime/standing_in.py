"""What stands in for the forward of a module: called in its place, and a leaf to whoever reads the model.

A stand-in is an attribute of its module, and runs that module: a copy of the module needs one of its own (`on`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Generic, NoReturn, Self, TypeVar

from torch import nn

from revify.errors import RefusalError
from revify.runtime.links import Rule
from revify.runtime.states import Habits
from revify.runtime.torch_internals import hidden_from_compiler, is_exporting, refused_export

RuleT = TypeVar("RuleT", bound=Rule)


class StandIn:
    """Stands in for the forward of a module.

    Args:
        module: the module that it sits in.
        name: its path, for errors.

    Attributes:
        own: the forward that the instance had instead of its class's, None where it had none.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.own: Callable[..., Any] | None = vars(module).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: side inputs and results of every type pass through
        if is_exporting():
            return self._exported(*args, **kwargs)
        tracer = next((t for a in (*args, *kwargs.values()) if (t := getattr(a, "tracer", None)) is not None), None)
        if tracer is not None:  # torch.fx reads the model: it sees a leaf, which runs as ever in what it makes
            return tracer.create_proxy("call_module", tracer.path_of_module(self.module), args, kwargs)
        return self._hidden(*args, **kwargs)

    @property
    def plain_in_eval(self) -> bool:
        """Whether a module in eval mode is run as it was."""
        return False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward as the plan has it."""
        raise NotImplementedError

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward as it was."""
        return self.own(*args, **kwargs) if self.own else type(self.module).forward(self.module, *args, **kwargs)

    def on(self, module: nn.Module) -> Self:
        """The same for a copy of the module."""
        other = copy.copy(self)
        other.module = module
        return other

    def _exported(self, *args: Any, **kwargs: Any) -> Any:
        """What goes into a graph that torch makes of the model."""
        if self.plain_in_eval and not self.module.training:
            return self.plain(*args, **kwargs)
        way = refused_export()
        if way:
            other = way.replace("True", "false").replace("False", "True").replace("false", "False")
            raise RefusalError(
                f"{self.name}: {way} cannot read this block of a converted model. Call {other}, or export the plain model, "
                "revify.revert(model)."
            )
        return self.run(*args, **kwargs)

    @hidden_from_compiler
    def _hidden(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    @property
    def __globals__(self) -> NoReturn:
        """What torch.jit.script asks for, to compile a forward from its source."""
        raise _NoSourceError(
            f"{self.name}: torch.jit.script compiles the source of a forward, and a converted block has none of its own. "
            "Script the plain model, torch.jit.script(revify.revert(model)), or trace the converted one: "
            "torch.jit.trace(model.eval(), inputs)."
        )


class StageStep(StandIn, Generic[RuleT]):
    """Stands in for the forward of a block that is the `index`-th step of a stage, or has it as a part.

    Args:
        module: the block, as it was.
        rule: what the stage's steps share.
        index: k, counted from 0.
        stream: which argument is the stream, a position or a keyword.
        transform: T where it is a part of the block: called as its forward, with the block before the arguments.
        result: which of several results is the stream, None where T returns one tensor; the others pass through.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: RuleT,
        index: int,
        stream: int | str = 0,
        transform: Callable[..., Any] | None = None,
        result: int | None = None,
    ) -> None:
        super().__init__(module, rule.names[index])
        self.rule, self.index, self.stream = rule, index, stream
        self.transform, self.result = transform, result
        self.habits = Habits()

    @property
    def last(self) -> bool:
        """Whether no step follows."""
        return self.index + 1 == len(self.rule.names)

    def transformed(self, *args: Any, **kwargs: Any) -> Any:
        """T."""
        return self.transform(self.module, *args, **kwargs) if self.transform else self.plain(*args, **kwargs)


class _NoSourceError(RefusalError, AttributeError):
    """Who only asks whether there is a source hears no, as of every missing attribute."""
