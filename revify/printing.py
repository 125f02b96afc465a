"""Rows → a table as text: the one printer of plans, measurements and results."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence

WIDTH = 140


def draw_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", notes: Sequence[str] = ()
) -> str:
    """A table as text, with lines of text below it.

    Example:
        >>> print(draw_table(["form", ">MB"], [["plain", "12.5"]], notes=["MB: 10^6 bytes"]))
          form      MB
         ──────────────
          plain   12.5
        MB: 10^6 bytes

    Args:
        columns: their names; those with ">" in front are set to the right.
        rows: the cells, as they are to be printed.
        title: a line above the table.
        notes: lines below it; long ones are broken.
    """
    state = random.getstate()
    from rich import box
    from rich.console import Console
    from rich.table import Table

    random.setstate(state)  # rich draws a number when it is imported, and training programs count theirs
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, highlight=False, markup=False, emoji=False)
    console.print(table)
    for note in notes:
        console.print(note)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
