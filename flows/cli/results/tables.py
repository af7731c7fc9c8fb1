"""One table in the formats that people paste into terminals, documents and papers."""

import csv
import html
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.redaction import clean_text, redact

Format = Literal["table", "md", "csv", "latex", "html", "json"]
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


FIGURE = re.compile(r"-|[+-]\d[\d.,e+-]*(?: \[[-+\d.,e ]+\])?(?: \*)?")
"""A signed figure with its interval, or the dash of a missing one."""


@dataclass(frozen=True)
class Grid:
    """A table of text cells with a title."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def cleaned(self) -> "Grid":
        """Return the grid without secrets and control characters: cells quote settings."""
        rows = tuple(tuple(clean_text(redact(cell)) for cell in row) for row in self.rows)
        return Grid(self.title, tuple(clean_text(cell) for cell in self.header), rows)


def render(grids: Sequence[Grid], notes: Sequence[str], *, as_format: Format, data: object) -> str:
    """Return tables and notes as text; `data` is what JSON shows instead."""
    if as_format == "json":
        return json.dumps(data, indent=1)
    write: dict[str, Callable[[Grid], str]] = {
        "table": write_plain, "md": write_markdown, "csv": write_csv, "latex": write_latex, "html": write_html,
    }  # fmt: skip
    parts = [write[as_format](grid.cleaned()) for grid in grids if grid.rows]
    mark = {"csv": "# {}", "latex": "% {}", "html": "<p>{}</p>"}.get(as_format, "{}")
    texts = [clean_text(redact(note)) for note in notes]
    parts += [mark.format(html.escape(note) if as_format == "html" else note) for note in texts]
    return ("\n" if as_format == "csv" else "\n\n").join(parts)


def write_plain(grid: Grid) -> str:
    """Return aligned columns."""
    lines = [grid.header, *grid.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(grid.header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def write_markdown(grid: Grid) -> str:
    """Return a GitHub table."""
    lines = [grid.header, ("---",) * len(grid.header), *grid.rows]
    # Backslashes too: one before a pipe would escape the backslash that escapes it.
    escaped = [[cell.replace("\\", r"\\").replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def write_csv(grid: Grid) -> str:
    """Return RFC 4180 with Unix line ends; a cell that a spreadsheet would take for a formula begins with a quote."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for line in (grid.header, *grid.rows):
        writer.writerow([f"'{cell}" if is_formula(cell) else cell for cell in line])
    return buffer.getvalue().rstrip("\n")


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet would compute a cell; differences with their signs are plain figures."""
    return cell.startswith(("=", "@", "+", "-", "\t", "\r")) and not FIGURE.fullmatch(cell)


def write_latex(grid: Grid) -> str:
    """Return a tabular for the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(LATEX.get(char, char) for char in cell) for cell in cells) + r" \\"

    columns = "l" * len(grid.header)
    body = "\n".join(line(row) for row in grid.rows)
    head = f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(grid.header)}\n\\midrule"
    return f"{head}\n{body}\n\\bottomrule\n\\end{{tabular}}"


def write_html(grid: Grid) -> str:
    """Return a table element with a caption."""
    head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in grid.header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    caption = html.escape(grid.title)
    return f"<table>\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
