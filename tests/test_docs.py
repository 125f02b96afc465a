"""Every piece of code in the README and in docstrings runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import revify

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "revify").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=flags)
    for example in finder.find(module):
        runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0


@pytest.mark.parametrize("page", ["README.md", "docs/guides.md"])
def test_pages(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_the_architecture_names_every_room_and_no_file_that_is_not_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text[text.index("```\n") : text.index("## Who may import whom")]
    for path in (ROOT / "revify").iterdir():
        if path.name not in ("__pycache__", "__main__.py", "_version.py", "py.typed"):
            assert path.name in tree, f"{path.name} is not in the tree of docs/architecture.md"
    for name in re.findall(r"`(revify/[\w/]+\.py|tests/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), f"docs/architecture.md names {name}, which is not there"


def test_each_word_of_the_glossary_has_one_meaning() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("## The words") : text.index("## Six ways")]
    words = re.findall(r"^\| ([\w ]+) \|", section, re.MULTILINE)[1:]
    assert len(words) == len(set(words)) >= 25


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_name_is_in_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md"))
    names = [name for name in revify.__all__ if not name.startswith("_")]
    missing = [name for name in names if not re.search(rf"\b{name}\b", pages)]
    assert not missing, f"no page says a word about {missing}"


def test_no_picture_lies_about_that_no_page_shows() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")))
    unseen = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.png") if path.name not in pages]
    assert not unseen


def test_each_row_of_the_page_of_behaviour_names_a_test_that_is_there() -> None:
    rows = [line for line in (ROOT / "docs" / "behaviour.md").read_text(encoding="utf-8").splitlines() if "`" in line]
    named = [re.search(r"`([\w/]+\.py)::(\w+)` \|$", row) for row in rows if row.startswith("| ")]
    assert len(named) >= 15
    for found in named:
        assert found is not None
        assert f"def {found[2]}(" in (ROOT / "tests" / found[1]).read_text(encoding="utf-8"), found[0]
