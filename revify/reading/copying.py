"""A module tree → a copy of it in which everything speaks of the copy: functions that wrap a forward, too.

    block.forward = wrapper(block.forward)        the copy's wrapper calls the copy's forward

copy.deepcopy leaves functions as they are, with the modules that they close over. Here such functions are made anew
(closures, partial functions, bound methods). What cannot be copied is shared: tensors with a graph, locks, files.
"""

from __future__ import annotations

import copy
import dis
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any  # attributes of modules are of every type

import torch
from torch import Tensor, nn

from revify.errors import RefusalError

TREE = ("_parameters", "_buffers", "_modules")
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
ATOMS = (type(None), bool, int, float, complex, str, bytes, type, ModuleType, CodeType, torch.dtype, torch.device)
COPIED = (nn.Module, Tensor, FunctionType, MethodType, CellType, list, dict, set, tuple, frozenset)


def copy_tree(model: nn.Module, memo: dict[int, Any], graphed: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A deep copy of a module tree.

    Args:
        model: any module; it stays as it is.
        memo: copy.deepcopy's: what is already copied, or to be shared, by identity.
        graphed: what a tensor with a graph becomes, that was kept as an attribute; without it such tensors are shared.

    Raises:
        RefusalError: an attribute of a module cannot be copied, or reaches back into the given model in a way that a
            copy cannot follow.
    """
    held = [value for module in model.modules() for value in attributes(module).values()]
    for part in _walk(*held):
        if isinstance(part, Tensor) and not part.is_leaf and id(part) not in memo:
            memo[id(part)] = graphed(part) if graphed else part
        elif _has_no_copy(part):
            memo[id(part)] = part
    try:
        copied: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:  # an attribute's own code may fail in any way
        raise RefusalError(_uncopied(model, memo, error)) from error
    exchange(copied, {id(module): memo[id(module)] for module in model.modules()}, memo)
    return copied


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides its parameters, buffers, children and hooks."""
    return {name: value for name, value in vars(module).items() if name not in TREE and name not in HOOKS}


def exchange(model: nn.Module, others: Mapping[int, Any], memo: dict[int, Any] | None = None) -> None:
    """Let the attributes of a tree speak of other objects, in place.

    Args:
        model: a tree of one's own.
        others: what stands for an object, by its identity.
        memo: copies of the objects that the tree was copied from, by their identity.

    Raises:
        RefusalError: an attribute reaches one of the objects in a way that cannot be followed.
    """
    work = _Exchange(others, memo if memo is not None else {})
    for path, module in model.named_modules():
        for name, value in attributes(module).items():
            if value is not module and work.reaches(value):
                place = f"{path}.{name}" if path else name
                module.__dict__[name] = work.moved(value, f"{type(model).__name__}: the attribute {place}")


def is_compiled(function: Any) -> bool:
    """Whether a function is what torch.compile made of another one."""
    return isinstance(function, FunctionType) and hasattr(function, "_torchdynamo_orig_callable")


class _Exchange:
    """Makes functions and containers anew where they reach certain objects."""

    def __init__(self, others: Mapping[int, Any], memo: dict[int, Any]) -> None:
        self._others, self._memo = others, memo
        self._own = {id(value) for value in memo.values()}
        self._done: dict[int, Any] = {}

    def reaches(self, value: Any) -> bool:
        """Whether a value leads to one of the objects."""
        return any(id(part) in self._others for part in _walk(value))

    def moved(self, value: Any, place: str) -> Any:
        """The value with every such object exchanged."""
        if id(value) in self._others:
            return self._others[id(value)]
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, nn.Module) or not self.reaches(value):
            return value
        if is_compiled(value):  # as torch's own copies of compiled modules, the copy is not compiled
            return self.moved(value._torchdynamo_orig_callable, place)
        if isinstance(value, FunctionType):
            return self._function(value, place)
        if isinstance(value, MethodType):
            return MethodType(self.moved(value.__func__, place), self.moved(value.__self__, place))
        if type(value) is partial:
            keywords = {name: self.moved(item, place) for name, item in value.keywords.items()}
            made = partial(self.moved(value.func, place), *(self.moved(a, place) for a in value.args), **keywords)
            vars(made).update({name: self.moved(item, place) for name, item in vars(value).items()})
            return made
        if type(value) in (list, tuple, set):
            return type(value)(self.moved(item, place) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple, such as a QConfig
            return type(value)(*(self.moved(item, place) for item in value))
        if type(value) is dict:
            return {key: self.moved(item, place) for key, item in value.items()}
        return self._object(value, place)

    def _function(self, function: FunctionType, place: str) -> FunctionType:
        for name in _global_names(function):
            if self.reaches(function.__globals__[name]):
                raise RefusalError(
                    f"{place} is a function that reaches the model by the global name {name!r}, which a copy of the model "
                    "cannot follow. Take it away first, or let it get at the model by its arguments or a closure."
                )
        old = function.__closure__ or ()
        cells = tuple(CellType() if self.reaches(cell) else cell for cell in old)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        self._done[id(function)] = made  # before its cells: a function may close over itself
        for cell, fresh in zip(old, cells, strict=True):
            if fresh is not cell:
                fresh.cell_contents = self.moved(cell.cell_contents, place)
        made.__defaults__ = self.moved(function.__defaults__, place)
        made.__kwdefaults__ = self.moved(function.__kwdefaults__, place)
        made.__qualname__, made.__doc__, made.__module__ = function.__qualname__, function.__doc__, function.__module__
        vars(made).update({name: self.moved(item, place) for name, item in vars(function).items()})
        return made

    def _object(self, value: Any, place: str) -> Any:
        """An object of a class: a copy of it where it is not one's own yet, with its attributes exchanged."""
        own = self._memo.get(id(value), value)
        if self._memo and id(own) not in self._own:
            try:
                own = copy.deepcopy(value, self._memo)
            except Exception as error:  # the object's own code may fail in any way
                raise RefusalError(
                    f"{place} leads to a {type(value).__name__} that cannot be copied: {error}."
                ) from error
        shared = own is value and id(value) not in self._own
        self._done[id(value)] = self._done[id(own)] = own
        held = getattr(own, "__dict__", None)
        if held is None or (shared and self._memo):
            raise RefusalError(
                f"{place} reaches the model through a {type(value).__name__}, which a copy of the model cannot follow. "
                "Take it away first, and put it back afterwards."
            )
        for name, item in list(held.items()):
            if self.reaches(item):
                held[name] = self.moved(item, place)
        return own


def _walk(*values: Any) -> Iterator[Any]:
    """The values and all that they lead to; modules and tensors are not entered."""
    seen: set[int] = set()
    pending = list(values)
    while pending:
        part = pending.pop()
        if id(part) in seen or isinstance(part, ATOMS):
            continue
        seen.add(id(part))
        yield part
        if not isinstance(part, nn.Module | Tensor):
            pending += _parts(part)


def _parts(value: Any) -> list[Any]:
    """What a value leads to directly."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # it is still empty
            return []
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        used = [value.__globals__[name] for name in _global_names(value)]
        near = [u for u in used if not isinstance(u, FunctionType) or u.__globals__ is value.__globals__]
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, vars(value), *near]
    held = [vars(value)] if hasattr(value, "__dict__") else []
    return [*held, value.func, value.args, value.keywords] if isinstance(value, partial) else held


def _global_names(function: FunctionType) -> list[str]:
    """The names of its file that a function uses, where they are there."""
    names, pending = set[str](), [function.__code__]
    while pending:
        code = pending.pop()
        names |= {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted(name for name in names if name in function.__globals__)


def _has_no_copy(value: Any) -> bool:
    """Whether a value is something like a lock or an open file."""
    if isinstance(value, COPIED) or _parts(value):
        return False
    try:
        copy.deepcopy(value)
    except Exception:  # the object's own code may fail in any way
        return True
    return False


def _uncopied(model: nn.Module, memo: dict[int, Any], error: Exception) -> str:
    """What to say of a tree that cannot be copied."""
    modules = {id(module): module for module in model.modules()}
    for path, module in model.named_modules():
        for name, value in attributes(module).items():
            try:
                copy.deepcopy(value, {**memo, **modules})
            except Exception as reason:  # as above
                place = f"{path}.{name}" if path else name
                return (
                    f"{type(model).__name__}: the attribute {place}, a {type(value).__name__}, cannot be copied: {reason}. "
                    "Take it away first, and put it back afterwards."
                )
    return f"{type(model).__name__} cannot be copied: {error}."
