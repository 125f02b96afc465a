"""A model that is edited in place is as it was where the edit fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from revify.reading.copying import HOOKS, TREE


@contextmanager
def unless_it_fails(model: nn.Module) -> Iterator[None]:
    """Edit a model in the body; what its modules hold is as before if that ends in an error."""
    before = [(vars(m), dict(vars(m)), {n: dict(vars(m)[n]) for n in (*TREE, *HOOKS)}) for m in model.modules()]
    try:
        yield
    except BaseException:
        for held, attributes, inner in before:
            held.clear()
            held.update(attributes)
            for name, items in inner.items():
                held[name].clear()
                held[name].update(items)
        raise
