"""Imports between revify's modules go one way, and importing revify does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import revify

PACKAGE = Path(revify.__file__).parent

HEAVY = ("timm", "torchvision", "accelerate", "sklearn", "matplotlib", "torch.distributed.fsdp", "torch._dynamo")


def imports_of(path: Path, names: dict[str, Path]) -> set[str]:
    """revify's modules that a file imports when it is imported itself: not within functions, not for types alone."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: revify imports by absolute names"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return found & names.keys()


def graph() -> dict[str, set[str]]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        dotted = ".".join(("revify", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        names[dotted] = path
    return {name: imports_of(path, names) - {name} for name, path in names.items()}


def layers(edges: dict[str, set[str]]) -> list[set[str]]:
    """Modules sorted so that each imports only earlier layers; what is left over is a cycle."""
    edges, found = dict(edges), []
    while layer := {name for name, wanted in edges.items() if not wanted & edges.keys()}:
        found.append(layer)
        edges = {name: wanted for name, wanted in edges.items() if name not in layer}
    assert not edges, f"these import each other in a circle: { {n: w & edges.keys() for n, w in edges.items()} }"
    return found


def test_imports_go_one_way() -> None:
    found = layers(graph())
    assert len(found) > 5
    assert "revify.errors" in found[0]


def test_the_mathematics_knows_nothing_of_models() -> None:
    edges = graph()
    assert edges["revify.stream"] == set()
    assert edges["revify.replay"] <= {"revify.errors", "revify.predictors"}
    assert not edges["revify.runtime"] & {"revify.planning", "revify.tracing", "revify.blocks", "revify.rewriting"}


def test_only_the_rewriting_edits_modules() -> None:
    """Only these set the forward of a module; the last three that of copies of their own, to try and to measure."""
    setters = {
        path.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr == "forward" and ast.unparse(target.value) != "self"
    }
    assert setters == {"rewriting.py", "branches.py", "splitting.py", "measuring.py"}


def test_importing_does_no_heavy_work() -> None:
    script = (
        "import sys, torch\n"
        "before = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()\n"
        "import revify\n"
        "after = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()\n"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    assert sorted(revify.__all__) == revify.__all__
    for name in revify.__all__:
        assert hasattr(revify, name)
    public = {"plan", "convert", "revert", "plain_backward", "Plan", "RevifyError", "save", "load", "measure"}
    assert public <= set(revify.__all__)
