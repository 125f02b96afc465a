"""Under which conditions a module ran, to run it again under the same ones.

Repeats: random numbers, autocast, what torch keeps for the whole process (`settings`), and the module tree with everything
in it (`states`). Happens once: updates of buffers, parameters and attributes; a second run works on copies of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from revify.runtime.randomness import Draws, KeptSeed, KeptState, random_numbers, random_states
from revify.runtime.settings import Settings
from revify.runtime.states import Habits, State
from revify.runtime.torch_internals import is_autocast


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast state of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype


@dataclass(slots=True)
class Conditions:
    """Under which conditions a module ran.

    Args:
        state: of its tree.
        settings: of torch.
        autocast: the state of each device type involved.
        random: the state of each generator from which the run drew numbers.
    """

    state: State
    settings: Settings
    autocast: tuple[Autocast, ...]
    random: dict[torch.device, KeptState | KeptSeed] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def recorded(cls, module: nn.Module, device: torch.device, habits: Habits, draws: Draws) -> Iterator[Conditions]:
        """Note the conditions in which the body runs `module`.

        Args:
            module: that runs.
            device: where its stream lives.
            habits: what the module is known to change.
            draws: keeps the random states of this forward pass.
        """
        autocast = tuple(
            Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", device.type})
            if torch.amp.is_autocast_available(kind)
        )
        before = random_states(device)
        conditions = cls(State(module, habits), Settings.now(), autocast)
        conditions.random.update({p: KeptState(s) for p, s in before.items()})  # for a look inside while the body runs
        with conditions.state.hooks.watched():
            yield conditions
        after = random_states(device)
        conditions.random = {
            place: draws.keep(place, state) for place, state in before.items() if not torch.equal(state, after[place])
        }
        conditions.state.after()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run the body under the same conditions; on leaving, everything is as it was before."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for state in self.autocast:
                stack.enter_context(torch.autocast(state.device_type, state.dtype, enabled=state.enabled))
            stack.enter_context(self.settings.again())
            if self.random:
                stack.enter_context(random_numbers(self.random))
            stack.enter_context(self.state.again())
            yield


def drop_weight_copies(device: torch.device) -> None:
    """Let go of the copies of weights that autocast keeps until it ends, which is the end of the forward pass.

    What runs again makes its copies anew, so nobody needs them; of a transformer they are a third of what is held in
    forward. Ordinary autograd on the same model must let go of them, too: where a weight is used in two places, its
    gradient is summed in another precision. Without gradients nobody holds them for long, and later calls may use them.
    """
    if is_autocast(device.type) and torch.is_grad_enabled():
        torch.clear_autocast_cache()
