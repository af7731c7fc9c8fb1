"""MLflow's own SQLite file below `output_dir`: made once whoever comes first, and at home wherever its folder lies."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

# MLflow stores where artifacts lie as absolute addresses (mlflow/store/tracking/dbmodels/models.py).
LOCATED = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}


@contextmanager
def first_use(folder: Path) -> Iterator[None]:
    """Let one process at a time open the database: two that create its tables at once would both fail."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".mlflow.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def relocate_artifacts(database: Path, artifacts: Path) -> None:
    """Point every stored address at this folder's artifacts, where the folder was moved or copied.

    Without this a copied folder would write into the original.
    """
    if not database.is_file():
        return
    here = artifacts.as_uri()
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        columns = list(list_columns(connection))
        if ("experiments", "artifact_location") not in columns:
            return
        rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (location,) in rows:
            if is_own(location) and location != here and not is_same(location, artifacts):
                for table, column in columns:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 - names of our own
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here, len(location) + 1, location, len(location) + 1, f"{location}/"),
                    )


def list_columns(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Yield those of the columns with addresses that this version of MLflow has."""
    for table, names in LOCATED.items():
        there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        yield from ((table, name) for name in names if name in there)


def is_own(location: object) -> bool:
    """Whether an address is one that this package gave to an experiment."""
    return isinstance(location, str) and location.startswith("file://") and location.endswith("/artifacts")


def is_same(location: str, artifacts: Path) -> bool:
    """Whether an address leads to the same folder by another way, such as a link."""
    from urllib.parse import unquote, urlparse

    path = unquote(urlparse(location).path)
    return os.path.exists(path) and artifacts.exists() and os.path.samefile(path, artifacts)
