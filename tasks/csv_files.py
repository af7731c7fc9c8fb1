"""Read small hand-written CSV files; errors name the line."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from tasks.errors import ConfigError
from tasks.redaction import show_value


def read_rows(path: Path, columns: Sequence[str], *, setting: str) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a file with their line numbers; missing columns and fields are empty strings.

    Args:
        columns: the allowed columns; the first is required.
        setting: the setting that names the file, for messages.

    Raises:
        ConfigError: the file can't be read, is not UTF-8 or CSV, or has unknown, missing or repeated columns.

    """

    def check(header: list[str], where: str) -> list[str]:
        return check_columns(header, columns, where)

    rows = read_table(path, check=check, setting=setting, way_out=f"the columns are {','.join(columns)}")
    return [(number, dict.fromkeys(columns, "") | row) for number, row in rows]


def read_table(
    path: Path, *, check: Callable[[list[str], str], list[str]], setting: str, way_out: str
) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a file with their line numbers; fields missing at a row's end are left out.

    Args:
        check: returns the columns, given the file's header and where it is; raises ConfigError for a wrong one.
        setting: the setting that names the file, for messages.
        way_out: which columns there are, for messages.

    Raises:
        ConfigError: the file can't be read, or is not UTF-8 or CSV.

    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}={path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeError as error:
        line = data[: getattr(error, "start", 0)].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: this is not UTF-8; save the file as CSV in UTF-8") from error
    # newline="" leaves line ends inside quoted fields to the reader, as `csv` requires.
    # `strict`, since csv otherwise accepts an unclosed quote and reads the rest of the file as one field.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            where = f"{path}, line {reader.line_num}"
            if header is None:
                header = check([cell.strip() for cell in cells], where)
                continue
            if len(cells) > len(header):
                raise ConfigError(f"{where}: {len(cells)} fields, not {len(header)}; quote a text that holds commas")
            rows.append((reader.line_num, dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: this is not CSV ({error}); {way_out}") from error
    if header is None:
        raise ConfigError(f"{path}, line 1: the file is empty; {way_out}")
    return rows


def check_columns(header: list[str], columns: Sequence[str], where: str) -> list[str]:
    """Return a file's columns. Raises ConfigError where one is missing, unknown or repeated."""
    way_out = f"the columns are {','.join(columns)}"
    for name in header:
        if name not in columns:
            raise ConfigError(f"{where}: there is no column {show_value(name)}; {way_out}")
    if columns[0] not in header or len(set(header)) < len(header):
        problem = "no column " + columns[0] if columns[0] not in header else "duplicate column"
        raise ConfigError(f"{where}: {problem}; {way_out}")
    return header
