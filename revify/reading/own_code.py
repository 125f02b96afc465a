"""What a block's own Python code does besides computing: what a graph of its operations would leave out, or fix for ever.

    draws           random numbers that decide, while the graph is made, what is in it
    side effects    attributes that are set, lists that grow, text that is printed: once in a graph, at each call in the block
    flags           attributes that are numbers, texts or None: a graph has what they were

The code is looked at while the block is traced: the functions that run, by their bytecode. The children's code is not among
them, since they are leaves that run as they are.
"""

from __future__ import annotations

import dis
import random
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_GLOBAL", "DELETE_GLOBAL")
CHANGES = {"append", "appendleft", "extend", "insert", "update", "setdefault", "write", "setattr", "print", "open"}
LASTING = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
SHOWS = {"write", "setattr", "print", "open"}
GENERATORS = ("Generator", "RandomState", "Random")  # of torch, numpy and Python

Flags = dict[str, Any]  # Any: numbers, texts, None, and tuples of them


class Witness:
    """Context: looks at the methods of a block and its children that run in the body, and at what else they call.

    Args:
        block: the module whose forward runs.

    Attributes:
        draws: whether random numbers were drawn in the body, by torch, Python or numpy.
        changes: whether one of the functions sets attributes or items, or calls something that changes its object.
    """

    def __init__(self, block: nn.Module) -> None:
        self._paths = {id(part): path for path, part in block.named_modules()}
        self._block = block
        self._seen: dict[CodeType, str | None] = {}
        self.draws = False

    def __enter__(self) -> Witness:
        self._random = _random_states()
        self._before = sys.getprofile()
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        self.draws = self._random != _random_states()

    @property
    def changes(self) -> bool:
        return any(
            step.opname in STORES or (step.opname.startswith("LOAD_") and step.argval in CHANGES)
            for code in self._seen
            for step in dis.get_instructions(code)
        )

    @property
    def outlasts(self) -> bool:
        """Whether one of the functions does what is still there when it has returned; lists of its own may grow."""
        return any(
            step.opname in LASTING or (step.opname.startswith("LOAD_") and step.argval in SHOWS)
            for code in self._seen
            for step in dis.get_instructions(code)
        )

    def flags(self) -> Flags:
        """The attributes, by path from the block, that the functions read and that are no modules or tensors."""
        found: Flags = {}
        for code, path in self._seen.items():
            if path is not None:
                for names in _chains(code):
                    found.update(_flag(self._block, [*path.split("."), *names] if path else names))
        return {name: value for name, value in found.items() if name.rpartition(".")[2] != "training"}

    def _look(self, frame: FrameType, event: str, argument: object) -> None:
        home = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if event != "call" or home in ("torch", "revify") or home in sys.stdlib_module_names:
            return
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(first) in self._paths or (frame.f_back is not None and frame.f_back.f_code in self._seen):
            self._seen.setdefault(code, self._paths.get(id(first)))


def has_generator(block: nn.Module) -> bool:
    """Whether the block holds a random number generator of its own."""
    return any(type(value).__name__ in GENERATORS for value in vars(block).values())


def sizes_of(block: nn.Module) -> list[int]:
    """How long the lists, sets and dictionaries are that its modules hold, so that one that grew is seen."""
    parts = (value for part in block.modules() for value in vars(part).values())
    return [len(value) for value in parts if isinstance(value, list | set | dict)]


def changed_flag(block: nn.Module, flags: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first flag that is not what it was, and what it is."""
    for path, value in flags.items():
        now: Any = block
        for name in path.split("."):
            now = getattr(now, name, None)
        if now is not value and (type(now) is not type(value) or now != value):
            return path, now
    return None


def _flag(block: nn.Module, names: list[str]) -> Flags:
    value: Any = block
    for place, name in enumerate(names):
        if not hasattr(value, name):
            return {}
        value = getattr(value, name)
        if _is_plain(value):
            return {".".join(names[: place + 1]): value}
    return {}


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _chains(code: CodeType) -> Iterator[list[str]]:
    """The attributes of its first argument that a function reads: ["attn", "scale"] for self.attn.scale."""
    own = code.co_varnames[0]
    names: list[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and names is not None:
            names.append(str(step.argval))
            continue
        if names:
            yield names
        loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        names = [] if step.opname.startswith("LOAD_FAST") and loaded[-1] == own else None


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in state]
