"""PostgreSQL, as Debian packages it."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def find_program(name: str) -> str | None:
    """Return a program of PostgreSQL; Debian keeps those of the server out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


def as_postgres(name: str, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a program of PostgreSQL, which refuses to run as root."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    program = str(find_program(name))
    return subprocess.run(
        [*prefix, program, *command], capture_output=True, text=True, timeout=120, check=True, cwd="/"
    )


@pytest.fixture
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A new database on loopback, whose password holds characters that an address must encode.

    An empty address where PostgreSQL is not installed.
    """
    if not all(map(find_program, ("initdb", "pg_ctl"))):
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
