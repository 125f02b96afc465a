"""The fields of a record → options of a command line: names, types, defaults and help from the record itself.

epochs: int = 3                 "epochs: in all, …" in the docstring's Args       ─▶  --epochs N   in all, … (default: 3)
bits: int | Literal["auto"]                                                       ─▶  --bits N     a whole number or auto
resume: bool = False                                                              ─▶  --resume
"""

from __future__ import annotations

import argparse
import inspect
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Described:
    """A field of a record.

    Args:
        name: of the field.
        text: what its record's docstring says of it, on one line.
        kinds: the members of its annotation, None left out.
        default: its default value, None if it has none.
    """

    name: str
    text: str
    kinds: tuple[Any, ...]  # Any: annotations are of no common type
    default: Any

    @property
    def help(self) -> str:
        """The text, with the default if the text does not say it."""
        said = "default" in self.text or self.default is None or self.default is False
        shown = not said and self.default not in ((), "")
        words = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        return (self.text.rstrip(".") + (f" (default: {words})" if shown else "")).replace("%", "%%")


def describe(record: type) -> dict[str, Described]:
    """The fields of a record by name, with what its docstring says of each under Args.

    Args:
        record: a dataclass.
    """
    texts = dict(_arguments(inspect.getdoc(record) or ""))
    hints = get_type_hints(record, localns={"Tensor": object})
    found = {}
    for field in fields(record):
        default = None if field.default is MISSING else field.default
        found[field.name] = Described(field.name, texts.get(field.name, ""), _kinds(hints[field.name]), default)
    return found


def add_field(group: argparse._ArgumentGroup, field: Described, **special: Any) -> None:
    """Add the option for a field; without it on the command line its value is None.

    Args:
        group: of a parser.
        field: its name, with dashes, is that of the option.
        special: arguments of `add_argument` that go before those that follow from the field.
    """
    flag = f"--{field.name.replace('_', '-')}"
    if field.kinds == (bool,):
        group.add_argument(flag, action="store_true", default=None, help=field.help)
        return
    if "choices" not in special:
        special.setdefault("metavar", _metavar(field.kinds))
    group.add_argument(flag, **{"type": _reader(field.kinds), "help": field.help, **special})


def whole_or_auto(text: str) -> int | str:
    """A whole number, or the word "auto"."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto")
    return text if text == "auto" else int(text)


def _arguments(text: str) -> list[tuple[str, str]]:
    """Names and texts of the section Args of a docstring."""
    section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", section[1], flags=re.MULTILINE)[1:] if section else []
    split = [entry.partition(": ") for entry in entries]
    return [(name, " ".join(said.replace("`", "").split())) for name, _, said in split]


def _kinds(hint: Any) -> tuple[Any, ...]:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(member for member in members if member is not type(None))


def _reader(kinds: tuple[Any, ...]) -> Callable[[str], Any]:
    """What makes a value of a word; words that must be among some are checked by the record."""
    if int in kinds and str not in kinds:
        return int if len(kinds) == 1 else whole_or_auto
    known = [kind for kind in (float, Path) if kinds == (kind,)]
    return known[0] if known else str


def _metavar(kinds: tuple[Any, ...]) -> str:
    if get_origin(kinds[0]) is Literal:
        return "NAME"
    if str in kinds and int in kinds:
        return "BYTES"
    return {int: "N", float: "X", Path: "FILE"}.get(kinds[0], "NAME")
