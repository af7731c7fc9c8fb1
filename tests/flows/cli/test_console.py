"""What servers and files supply is shown as text, whatever it holds."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from flows.cli.console import make_cell


@pytest.mark.parametrize("text", ["[/red] closes nothing", "[bold]x", "\x1b[31mred\x1b[0m", "a\x07b\u202ec", "\\[x]"])
def test_a_table_cell_escapes_markup_and_strips_control_characters(text: str) -> None:
    output = io.StringIO()
    table = Table(box=None)
    table.add_column("found")
    table.add_row(make_cell(text))
    Console(file=output, width=80, force_terminal=False).print(table)
    shown = output.getvalue().splitlines()[-1].strip()
    assert shown == "".join(char for char in text if char.isprintable())
