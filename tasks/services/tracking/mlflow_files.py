"""MLflow's SQLite file below `output_dir`: created whole by one process at a time, and relocatable with its folder."""

import fcntl
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
UNFINISHED, UNFINISHED_SECONDS, POLL_SECONDS = ".mlflow-", 60.0, 0.2
# MLflow stores artifact locations as absolute URIs (mlflow/store/tracking/dbmodels/models.py).
LOCATED = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}


@contextmanager
def first_use(folder: Path) -> Iterator[None]:
    """Serialize opening the database across processes: two that create its tables concurrently would both fail."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".mlflow.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_database(database: Path, *, default_artifacts: str) -> None:
    """Create the file under another name and link it here; to be called within `first_use`.

    MLflow creates the tables by a series of migrations, which SQLite does not undo. Where the process is killed
    meanwhile, or the disk is full, it refuses the file for ever (mlflow 3: "table _alembic_tmp_experiments exists").
    `default_artifacts` is where the experiment Default keeps its own.
    """
    for left in database.parent.glob(f"{UNFINISHED}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    deadline = time.monotonic() + UNFINISHED_SECONDS
    while is_unfinished(database):
        if time.monotonic() > deadline:
            set_aside(database)
            break
        time.sleep(POLL_SECONDS)  # a server of MLflow's, started by hand, may be creating it
    if database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    silence()
    # A new name for each attempt: MLflow keeps the connections of an address for the life of the process.
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=database.parent) as folder:
        path = Path(folder) / database.name
        store: Any = SqlAlchemyStore(f"sqlite:///{path}", default_artifacts)  # type: ignore[no-untyped-call]
        store.engine.dispose()
        remove_journals(database)
        try:
            os.link(path, database)
        except FileExistsError:  # a server's: never replaced, since it may be open
            pass
        except OSError:  # a file system without hard links
            path.replace(database)


def silence() -> None:
    """Keep migrations of a new database out of the log; to be called once MLflow is imported, which sets levels."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def set_aside(database: Path) -> None:
    """Rename a file whose creation was cut off, so that it is created anew."""
    aside = database.with_name(f"{database.name}.unfinished")
    log.warning("%s was created by half and holds no run; it is now %s", database, aside.name)
    remove_journals(database)
    database.replace(aside)


def remove_journals(database: Path) -> None:
    """Remove what SQLite would apply to the next file of this name."""
    for suffix in ("-journal", "-wal", "-shm"):
        database.with_name(f"{database.name}{suffix}").unlink(missing_ok=True)


def is_unfinished(database: Path) -> bool:
    """Whether a file holds tables of a migration that was cut off, and no run."""
    if not database.is_file():
        return False
    try:
        with closing(sqlite3.connect(database, timeout=30)) as connection:  # writable: SQLite may undo a transaction
            tables = {
                str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
            if not tables or ("runs" in tables and connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone()):
                return False  # an older MLflow's, which its own command upgrades
            from mlflow.store.db.utils import _get_latest_schema_revision

            is_versioned = "alembic_version" in tables
            versions = connection.execute("SELECT version_num FROM alembic_version").fetchall() if is_versioned else []
            return versions != [(_get_latest_schema_revision(),)]  # type: ignore[no-untyped-call]
    except sqlite3.Error:  # locked, damaged, or no database: MLflow says so
        return False


def relocate_artifacts(database: Path, artifacts: Path) -> None:
    """Point every stored address at this folder's artifacts, where the folder was moved or copied.

    Without this a copied folder would write into the original.
    """
    if not database.is_file():
        return
    here = artifacts.as_uri()
    # The connection's own context manager commits or rolls back, but does not close.
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        columns = list(list_columns(connection))
        if ("experiments", "artifact_location") not in columns:
            return
        rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (location,) in rows:
            if is_own(location) and location != here and not is_same(location, artifacts):
                for table, column in columns:
                    # `substr` rather than LIKE, to which `_` and `%` in a path are wildcards.
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 - names of our own
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here, len(location) + 1, location, len(location) + 1, f"{location}/"),
                    )


def find_artifact_location(database: Path, experiment: str) -> str:
    """Return the address where an experiment of an SQLite file keeps artifacts; empty where there is none.

    MLflow fixes it when the experiment is created: `file:` outside a server, `mlflow-artifacts:` behind one, whatever
    destination a server has later.
    """
    if not database.is_file():
        return ""
    # Not `mode=ro`: a transaction that a killed run has begun is undone first, which writes.
    address = f"{database.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(address, uri=True, timeout=30)) as connection:
        if ("experiments", "artifact_location") not in list_columns(connection):
            return ""
        rows = connection.execute("SELECT artifact_location FROM experiments WHERE name = ?", (experiment,)).fetchall()
    return next((str(location) for (location,) in rows), "")


def list_columns(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Yield the columns of LOCATED that exist in this version's schema."""
    for table, names in LOCATED.items():
        there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        yield from ((table, name) for name in names if name in there)


def is_own(location: object) -> bool:
    """Whether a location has the form that `MlflowTracker` gives to its experiments."""
    return isinstance(location, str) and location.startswith("file://") and location.endswith("/artifacts")


def is_same(location: str, artifacts: Path) -> bool:
    """Whether a location is the same folder by another path, such as a symbolic link."""
    from urllib.parse import unquote, urlparse

    path = unquote(urlparse(location).path)
    return os.path.exists(path) and artifacts.exists() and os.path.samefile(path, artifacts)
