"""A plan as it was written by an older version → as it is written now, before anything in it is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]  # Any: it is JSON
RENAMED = {"branches": "branch_bytes", "halves": "split_branches"}  # fields of a block


def as_written_now(fields: Fields) -> Fields:
    """The fields of a plan, under the names that they have now."""
    return _with_each(fields, "stages", _stage)


def _stage(fields: Fields) -> Fields:
    fields = _with_each(fields, "blocks", _block)
    if "random_sign" in fields:  # from when there were two signs of γ
        fields["sign"] = "random" if fields.pop("random_sign") else "positive"
    return fields


def _block(fields: Fields) -> Fields:
    return {RENAMED.get(name, name): value for name, value in fields.items()}


def _with_each(fields: Fields, name: str, change: Callable[[Fields], Fields]) -> Fields:
    items = fields.get(name)
    if not isinstance(items, list):
        return dict(fields)
    return {**fields, name: [change(item) if isinstance(item, dict) else item for item in items]}
