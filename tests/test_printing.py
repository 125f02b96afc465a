"""The printer of tables: names as they are, numbers to the right, and no random number drawn."""

from __future__ import annotations

import random
import subprocess
import sys

from revify.printing import draw_table


def test_columns_line_up_and_names_are_no_markup() -> None:
    text = draw_table(
        ("module", ">MB"), [("[red]stem[/red]", "1.25"), (":smile:", "12.50")], title="[b]", notes=["a", "b"]
    )
    lines = text.splitlines()
    assert lines[0] == "[b]"
    assert lines[-2:] == ["a", "b"]
    rows = [line for line in lines if line.endswith(("1.25", "12.50"))]
    assert [row.split()[0] for row in rows] == ["[red]stem[/red]", ":smile:"]
    assert len({len(row) for row in rows}) == 1


def test_a_row_may_end_early() -> None:
    assert "plain   out of memory" in draw_table(("form", ">MB", ">s"), [("plain", "out of memory")])


def test_nothing_is_drawn_from_the_generator_of_the_program() -> None:
    script = (
        "import random\n"
        "random.seed(3)\n"
        "from revify.printing import draw_table\n"
        "draw_table(('a',), [('b',)])\n"
        "print(random.random())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) == random.Random(3).random()
