"""The walls of the house (docs/architecture.md): who may import whom, and that importing revify does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import revify

PACKAGE = Path(revify.__file__).parent

HEAVY = ("timm", "torchvision", "accelerate", "sklearn", "matplotlib", "torch.distributed.fsdp", "torch._dynamo")

ROOMS = (
    "calibration",
    "couplings",
    "finetuning",
    "integrations",
    "measuring",
    "planning",
    "reading",
    "rewriting",
    "runtime",
)

MAY_IMPORT = {
    # beside itself, revify.errors, revify.words and revify._version
    "couplings": set(),
    "reading": set(),
    "runtime": {"couplings"},
    "rewriting": {"couplings", "reading", "runtime", "plans", "stage_plans"},
    "planning": {
        "couplings",
        "reading",
        "runtime",
        "rewriting",
        "plans",
        "stage_plans",
        "estimates",
        "methods",
    },  # it proves its candidates on rewritten copies
}


def imports_of(path: Path, names: dict[str, Path], *, anywhere: bool) -> set[str]:
    """revify's modules that a file imports: at all, within functions and for types too, or only when it is imported."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if not anywhere and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if not anywhere and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: revify imports by absolute names"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return found & names.keys()


def modules() -> dict[str, Path]:
    return {
        ".".join(("revify", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def graph(*, anywhere: bool = False) -> dict[str, set[str]]:
    names = modules()
    return {name: imports_of(path, names, anywhere=anywhere) - {name} for name, path in names.items()}


def room(name: str) -> str:
    """The package, or the file at the top, that a module belongs to."""
    return name.split(".")[1] if "." in name else name


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


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_walls_between_packages(name: str) -> None:
    allowed = {name, "errors", "words", "_version"} | MAY_IMPORT[name]
    for module, wanted in graph(anywhere=True).items():
        if room(module) == name:
            beyond = {other for other in wanted if room(other) not in allowed}
            assert not beyond, f"{module} imports {sorted(beyond)}, but {name} may import only {sorted(allowed)}"


def imported_packages(path: Path) -> set[str]:
    """The names that a file imports from outside, as written."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_runtime_knows_nothing_of_graphs_and_only_finetuning_imports_accelerate() -> None:
    for name, path in modules().items():
        imported = imported_packages(path)
        assert room(name) != "runtime" or not any(other.startswith("torch.fx") for other in imported), name
        assert room(name) == "finetuning" or not any(other.split(".")[0] == "accelerate" for other in imported), name


def test_every_folder_is_a_room_that_is_known() -> None:
    assert sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()) == list(ROOMS)


def test_only_the_rewriting_edits_modules() -> None:
    """Only these set the forward of a module; the others that of copies of their own, to try and to measure."""
    setters = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr == "forward" and ast.unparse(target.value) != "self"
    }
    assert setters == {
        "rewriting/applying.py",
        "rewriting/replicas.py",
        "planning/branching.py",
        "planning/containers.py",
        "planning/halving.py",
        "planning/repeating.py",
        "reading/flows.py",
        "measuring/measuring.py",
    }


def run(script: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_using_every_public_name_does_no_heavy_work_and_advances_no_generator() -> None:
    script = (
        "import random, sys, numpy, torch\n"
        "def state():\n"
        "    own, other = random.getstate(), numpy.random.get_state()\n"
        "    settings = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()\n"
        "    return repr(own), repr(other), torch.get_rng_state().tolist(), settings\n"
        "before = state()\n"
        "import revify\n"
        "assert state() == before\n"
        "for name in revify.__all__:\n"
        "    getattr(revify, name)\n"
        "assert state() == before\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    assert run(script) == "[]"


@pytest.mark.parametrize(
    "action",
    [
        "import revify",
        "import revify; dir(revify), revify.Method(bits=2)",
        "import revify.finetuning; revify.finetuning.Recipe(model='test_vit')",
        *(f"main({words})" for words in (["--version"], ["--help"], ["finetune", "--help"], ["nonsense"])),
    ],
)
def test_help_and_records_import_neither_torch_nor_numpy(action: str) -> None:
    script = (
        "import contextlib, io, sys\n"
        "from importlib import import_module\n"
        "def main(words):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):\n"
        "        import_module('revify.cli').main(words)\n"
        f"{action}\n"
        "foreign = sorted({'torch', 'numpy', 'timm', 'accelerate', 'safetensors'} & sys.modules.keys())\n"
        "own = sum(name.startswith('revify') for name in sys.modules)\n"
        "print(foreign, own if own > 12 or len(sys.modules) > 400 else 'few')\n"
    )
    assert run(script) == "[] few"


def test_public_names_are_there() -> None:
    assert sorted(revify.__all__) == revify.__all__
    assert dir(revify) == revify.__all__
    for name in revify.__all__:
        assert hasattr(revify, name)
    assert not hasattr(revify, "revertt")
    public = {"plan", "convert", "revert", "plain_backward", "Plan", "RevifyError", "save", "load", "measure"}
    assert public <= set(revify.__all__)
