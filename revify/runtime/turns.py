"""One thread at a time: what revify runs twice, it runs in turns.

A second run exchanges the attributes of its modules, and blocks that train draw from torch's generator as seeded for them.
Another thread that ran the same modules, or seeded the generator, in the middle of that would compute with what is not its
own. So the first run of what will run again, its second run, and whatever draws from a seed of its own, take turns
throughout the process. What is called in eval mode and not to run again waits for nobody.

Work that a thread waits for belongs to its turn: of a block that runs a backward of its own, the second runs go on in
a thread of autograd's, where there is a GPU. So a run remembers the turn that it began in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from revify.errors import StreamError

PATIENCE = 600.0  # seconds: blocks that are compiled when they first run may take minutes


class Turn:
    """The time in which one thread has its turn.

    Attributes:
        lasts: whether it does so now.
    """

    __slots__ = ("lasts",)

    def __init__(self) -> None:
        self.lasts = True


_lock = threading.Lock()
_current: ContextVar[Turn | None] = ContextVar("revify_turn", default=None)


def current_turn() -> Turn | None:
    """The turn that the thread has now."""
    return _current.get()


@contextmanager
def own_turn(within: Turn | None = None) -> Iterator[None]:
    """Wait for a turn, and have it in the body.

    Args:
        within: a turn that the body belongs to if it still lasts; then, and where the thread has a turn already, there
            is nothing to wait for.

    Raises:
        StreamError: another thread does not end its turn.
    """
    lasting = next((turn for turn in (within, _current.get()) if turn is not None and turn.lasts), None)
    if lasting is None and not _lock.acquire(timeout=PATIENCE):
        raise StreamError(
            f"another thread has been inside of a block of a converted model for {PATIENCE:g} seconds. Blocks run one "
            "after the other, whichever thread calls them: do not let a block wait for what another thread's block does "
            "(a barrier, or a batch norm that gathers over threads). Use one process for each of them."
        )
    turn = lasting or Turn()
    before = _current.set(turn)
    try:
        yield
    finally:
        _current.reset(before)
        if lasting is None:
            turn.lasts = False
            _lock.release()
