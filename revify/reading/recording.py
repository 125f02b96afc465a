"""One forward pass on tensors → a torch.fx graph of the functions that ran: for code that torch.fx cannot trace.

Symbolic tracing fails where the model's own Python looks at its values (a branch on sizes, keyword dictionaries, loops
over results). Here the code runs as it is, on the example, and every function of torch that it calls becomes a node:

    x ──────────────┐
    └─ layer_norm ─ linear ─ (add) → y         targets: the function, or a method's name, as in a traced graph

Values that are no tensors are not followed. What is recorded is the way that the example took.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from revify.reading.tracing import Example, Trace, TracedCall, call_with, run_copy, trace

IN_PLACE = {"__iadd__": "add_", "__imul__": "mul_", "__isub__": "sub_", "__itruediv__": "div_"}


def follow(model: nn.Module, example: Example) -> Trace:
    """Trace the model with torch.fx; where that fails, record a run of it.

    Args:
        model: any module; it stays as it is.
        example: its inputs.

    Raises:
        RefusalError: the model does not run on inputs of these shapes.
    """
    traced = trace(model, example)
    return traced if traced.failure is None else record(model, example, traced.failure)


def record(model: nn.Module, example: Example, failure: str) -> Trace:
    """Record one forward pass of a copy of the model.

    Args:
        model: any module; it stays as it is.
        example: its inputs.
        failure: why it was not traced.

    Returns:
        The graph with the module calls in it.

    Raises:
        RefusalError: the model does not run on inputs of these shapes.
    """
    return run_copy(model, example, lambda copied, given: _record(copied, given, failure))


def _record(model: nn.Module, example: Example, failure: str) -> Trace:
    recorder, calls = Recorder(), dict[str, list[TracedCall]]()
    modules = dict(model.named_modules())
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def entering(path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nodes = tuple(map(recorder.node, args)), {name: recorder.node(a) for name, a in kwargs.items()}
            given.append(nodes)
            recorder.stack.append(path)

        return enter

    def leaving(path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            recorder.stack.pop()
            nodes, named = given.pop()
            if _is_one_operation(module):
                recorder.collapse(path, tuple(n for n in (*nodes, *named.values()) if isinstance(n, fx.Node)), output)
            several = isinstance(output, tuple | list)
            result = [recorder.node(o) for o in output] if several else recorder.node(output)
            calls.setdefault(path, []).append(TracedCall(path, nodes, named, result))

        return leave

    with ExitStack() as hooks:
        for path, module in modules.items():
            for handle in (
                module.register_forward_pre_hook(entering(path), with_kwargs=True),
                module.register_forward_hook(leaving(path), with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        with recorder:
            call_with(model, example)
    return Trace(recorder.graph, calls, modules, failure)


def _is_one_operation(module: nn.Module) -> bool:
    """Whether a module is better known by its class than by what it calls: layers of torch, norms, activations."""
    home = type(module).__module__
    known = home.startswith("torch.nn.") or "norm" in home.rpartition(".")[2] or "activations" in home
    return known and not list(module.children())


class Recorder(TorchFunctionMode):
    """Adds a node to `graph` for every function that is called on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.stack: list[str] = []
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # so that identities are not reused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # Any: functions of torch take and return everything
        kwargs = kwargs or {}
        operands = self._operands(args), self._operands(kwargs)
        output = func(*args, **kwargs)
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if results:
            node = self._add(_target(func), *operands)
            for index, result in enumerate(results):
                several = len(results) > 1 or output is not result
                self._name(result, self._add("select_result", (node, index), {}) if several else node)
        return output

    def node(self, value: Any) -> Any:
        """The node of a tensor; an input of the graph where no function has made it. Other values stay themselves."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            self._name(value, self.graph.placeholder(f"value_{len(self._alive)}"))
        return self._nodes[id(value)]

    def collapse(self, path: str, operands: tuple[Any, ...], result: Any) -> None:
        """Let one call of a module stand for all that it did."""
        if isinstance(result, Tensor):
            self._name(result, self._placed(self.graph.call_module(path, operands)))

    def _add(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        return self._placed(self.graph.create_node(kind, target, tuple(args), dict(kwargs)))

    def _placed(self, node: fx.Node) -> fx.Node:
        node.meta["nn_module_stack"] = dict.fromkeys(self.stack)
        return node

    def _operands(self, arguments: Any) -> Any:
        """The arguments with tensors replaced by nodes; of the others only what a node may hold."""
        return tree_map(lambda a: self.node(a) if isinstance(a, Tensor) else _plain(a), arguments)

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node


def _target(func: Callable[..., Any]) -> Any:
    """A function itself; of a method its name, that of an operator as traces spell it."""
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__objclass__", None) or getattr(func, "__self__", None)
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return "transpose" if attribute in ("T", "mT", "H", "mH") else f"attribute {attribute}"
    if name in IN_PLACE:
        return IN_PLACE[name]
    if name == "__getitem__":
        return "getitem"
    is_method = (isinstance(owner, type) and issubclass(Tensor, owner)) or func is getattr(Tensor, name, None)
    if not is_method:
        return func
    plain = name.removeprefix("__r").removeprefix("__").removesuffix("__")
    return plain if name.startswith("__") else name


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | bool | str | None) else repr(type(value))
