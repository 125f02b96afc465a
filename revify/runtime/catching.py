"""What autograd saves in a second run of a module: caught, counted, and refused where the module was changed in between."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from revify.errors import ReplayError, StreamError
from revify.runtime.fingerprints import Fingerprint
from revify.runtime.replay import version
from revify.runtime.states import Watched

LIKELY_CAUSES = (
    "Likely causes: a non-deterministic kernel (torch.use_deterministic_algorithms(True) finds it), random numbers "
    "that revify does not repeat (Python's, numpy's, those that another thread draws at the same time: train in processes "
    "then), a state outside of the module's own attributes, weights changed through .data between forward and backward."
)


class EnoughError(BaseException):
    """Ends a second run of which nothing more is needed; no error, and nothing that a block's own `except` should see."""


class Catcher:
    """What autograd saves in a second run.

    Args:
        expected: how many tensors the first run saved.
        dropped: which of them it dropped.
        fingerprint: of these.
        name: of the module, for errors.

    Attributes:
        ends: whether the run may end when it has saved all of them.
    """

    def __init__(self, expected: int, dropped: set[int], fingerprint: Fingerprint, name: str) -> None:
        self.ends = False
        self.fingerprint = fingerprint
        self._expected, self._dropped, self._name = expected, dropped, name
        self._caught: list[tuple[Tensor, int]] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd saves this tensor; a backward of the module's own gets it back."""
        if len(self._caught) in self._dropped:
            self.fingerprint.add(tensor)
        self._caught.append((tensor.detach(), version(tensor)))
        if self.ends and len(self._caught) == self._expected:
            raise EnoughError
        return self._caught[-1][0]

    def caught(self) -> dict[int, tuple[Tensor, int]]:
        """What was saved so far, by its number."""
        return dict(enumerate(self._caught))

    def all_caught(self) -> dict[int, tuple[Tensor, int]]:
        """The tensors with their versions, by their number."""
        if len(self._caught) != self._expected:
            raise ReplayError(
                f"{self._name} saved {self._expected} tensors for backward in its first run and {len(self._caught)} when "
                f"run again, so its gradients cannot be computed. {LIKELY_CAUSES}"
            )
        return self.caught()


def refuse_changes(name: str, moved: list[Watched], found: Any) -> None:
    """Refuse a second run that used what was changed in place since the first.

    A parameter that it did not use may change: an optimizer that steps within the backward has done with the parameters of
    other branches of the same block already.
    """
    used = _parameters_behind(found) if moved else set()
    for watched in moved:
        shape = tuple(watched.tensor.shape)
        if watched.lost:
            raise ReplayError(
                f"{name} changed a {watched.kind} of shape {shape} in its forward pass, which it had not done in its first "
                "one, so its values before that are not known, and the block cannot be run again as it ran. Discard these "
                "gradients; from the next forward pass on these values are kept."
            )
        if isinstance(watched.tensor, nn.Parameter) and watched.requires_grad and id(watched.tensor) not in used:
            continue
        raise StreamError(
            f"{name}: a {watched.kind} of shape {shape} was changed in place between forward and backward, so the block "
            "cannot be run again as it ran. Call optimizer.step() after backward()."
        )


def _parameters_behind(outputs: Any) -> set[int]:
    """The identities of the parameters to which the graph of these outputs leads."""
    nodes = [leaf.grad_fn for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    seen: set[Node | None] = {None}
    found = set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            assert node is not None  # it is among those seen
            found.add(id(getattr(node, "variable", None)))
            nodes += [following for following, _ in node.next_functions]
    return found
