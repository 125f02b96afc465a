"""JSON ↔ frozen records, by the annotations of their fields: what is read has the right types, ranges and names.

    bits: Annotated[int, Range(0, 8)]     step: Literal["recurrence"]     side: Side, a StrEnum
    reason: Prose                         sign: Annotated[str, Among(SIGNS)]     cuts: tuple[Cut, ...]

A record says what must hold between its fields in a method `faults`, which gives a sentence for each thing that does not.
A new field of a record is read, checked and written by its annotation alone.
"""

from __future__ import annotations

import functools
import json
import math
import reprlib
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

STORED = "stored"  # in the metadata of a field: False keeps it out of JSON

_MOST_CHARACTERS = 2**24  # of a text that is parsed; each [] of it takes twenty times its size in memory
_MOST_CONTAINERS = 2**17


class FaultError(ValueError):
    """A value is not what its field holds; the text says where, what, and what was expected."""


@dataclass(frozen=True, slots=True)
class Range:
    """A number lies between two others, which it may be."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True, slots=True)
class Among:
    """A text is one of some names."""

    names: Collection[str]


@dataclass(frozen=True, slots=True)
class Length:
    """A text has no more characters, and only such as can be printed, beside line breaks and tabs where it is prose."""

    most: int
    prose: bool = False


Prose = Annotated[str, Length(2**16, prose=True)]

_NAME = Length(2**10)
_WHOLE = Range(0, 2**53)  # what every reader of JSON keeps exactly
_REAL = Range(-1e308, 1e308)


def parse(text: str) -> Any:  # Any: it is JSON
    """The value of a JSON text.

    Raises:
        FaultError: it is none, or one whose depth or size no record has.
    """
    if len(text) > _MOST_CHARACTERS or text.count("[") + text.count("{") > _MOST_CONTAINERS:
        raise FaultError(f"{len(text)} characters of JSON are more than any of revify's records takes")
    try:
        return json.loads(text)
    except RecursionError:
        raise FaultError("its brackets are nested too deeply") from None
    except ValueError as error:
        raise FaultError(f"it is not JSON: {error}") from error


def read(kind: Any, value: Any, where: str = "") -> Any:  # Any: kind is an annotation, value comes out of JSON
    """A value out of JSON as what an annotation says.

    Args:
        kind: a record's class, or an annotation of one of its fields.
        value: lists, dictionaries, numbers and texts.
        where: the path of the value, for errors.

    Raises:
        FaultError: the value is of another type, out of its range, too long, or a fault of a record.
    """
    limits: tuple[Any, ...] = ()
    if get_origin(kind) is Annotated:
        kind, *rest = get_args(kind)
        limits = tuple(rest)
    if is_dataclass(kind):
        return _record(kind, value, where)
    if get_origin(kind) in (Union, types.UnionType):
        return _one_of(get_args(kind), value, where)
    if get_origin(kind) is tuple:
        _expect(isinstance(value, list | tuple), value, where, "a list")
        return tuple(read(get_args(kind)[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if get_origin(kind) is Literal:
        return _text(value, where, Among(get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(_text(value, where, Among([str(member) for member in kind])))
    if kind is bool:
        _expect(isinstance(value, bool), value, where, "true or false")
        return value
    if kind is str:
        return _text(value, where, limits[0] if limits else _NAME)
    return _number(kind, value, where, limits[0] if limits else {int: _WHOLE, float: _REAL}[kind])


def shown(value: object) -> str:
    """A value from outside, short and in printable characters."""
    return printable(reprlib.repr(value))


def printable(text: str, most: int = 400) -> str:
    """A text from outside for an error or a table: on one line, without what a terminal would obey."""
    short = text if len(text) <= most else f"{text[:most]} …"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(short.split()))


def plain(record: Any) -> dict[str, Any]:
    """A record as a dictionary for JSON: all fields but those whose metadata say that they are not stored."""
    return {field.name: _plain(getattr(record, field.name)) for field in fields(record) if _is_stored(field)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return plain(value)
    if isinstance(value, float) and math.isnan(value):
        return None  # as if it had not been measured: JSON has no such number
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _is_stored(field: Any) -> bool:
    return bool(field.metadata.get(STORED, True))


def _record(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, Mapping), value, where, "an object")
    known = {field.name: field for field in fields(kind) if _is_stored(field)}
    unknown = sorted(str(name) for name in value if name not in known)
    if unknown:
        raise FaultError(f"{_place(where)} has the field {shown(unknown[0])}, which this revify does not know")
    missing = [name for name, field in known.items() if name not in value and _needed(field)]
    if missing:
        raise FaultError(f"{_place(where)} lacks the field {missing[0]!r}")
    hints = _hints(kind)
    given = {name: read(hints[name], item, f"{where}.{name}".lstrip(".")) for name, item in value.items()}
    record = kind(**given)
    for fault in _faults(record):
        raise FaultError(f"{where}: {fault}" if where else fault)
    return record


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a record, whose text is the same for ever."""
    return get_type_hints(kind, include_extras=True)


def _faults(record: Any) -> Iterator[str]:
    return record.faults() if hasattr(record, "faults") else iter(())


def _needed(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The value as the first of the kinds that has its type."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others:
        base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        if isinstance(value, str) == (base is str):
            return read(kind, value, where)
    return read(others[0], value, where)


def _text(value: Any, where: str, limit: Among | Length) -> str:
    _expect(isinstance(value, str), value, where, "a text")
    text: str = value
    if isinstance(limit, Among):
        _expect(text in limit.names, value, where, f"one of {', '.join(limit.names)}")
        return text
    _expect(len(text) <= limit.most, value, where, f"a text of at most {limit.most} characters")
    fine = text.encode(errors="ignore").decode() == text if limit.prose else text.isprintable()
    _expect(fine, value, where, "a text that can be printed")
    return text


def _number(kind: type, value: Any, where: str, limit: Range) -> int | float:
    what = f"{'a whole number' if kind is int else 'a number'} {limit}"
    right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    _expect(right and limit.low <= value <= limit.high, value, where, what)
    number: int | float = value
    return number


def _expect(holds: bool, value: Any, where: str, what: str) -> None:
    if not holds:
        raise FaultError(f"{_place(where)} is {shown(value)}, not {what}")


def _place(where: str) -> str:
    return where or "it"
