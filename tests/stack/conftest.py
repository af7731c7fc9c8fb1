"""PostgreSQL, as Debian packages it."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def as_postgres(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a program of PostgreSQL, which refuses to run as root."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    return subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=120, check=True, cwd="/")


@pytest.fixture
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A new database on loopback, whose password holds characters that an address must encode.

    An empty address where PostgreSQL is not installed.
    """
    if not all(map(shutil.which, ("initdb", "pg_ctl"))):
        yield ""
        return
    folder = Path("/tmp") / f"likeness-postgres-{os.getpid()}"
    folder.mkdir(mode=0o755)
    (folder / "password").write_text("p@ss/word")
    if os.geteuid() == 0:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = str(folder / "data")
    try:
        as_postgres("initdb", "-D", data, "-A", "scram-sha-256", "-U", "prefect", f"--pwfile={folder / 'password'}")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        as_postgres("pg_ctl", "-D", data, "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql+asyncpg://prefect:p%40ss%2Fword@127.0.0.1:{port}/postgres"
        finally:
            as_postgres("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
