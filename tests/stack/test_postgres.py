"""The local stack with Prefect's database in PostgreSQL, as Debian packages it."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flows.cli.stack.stack import PREFECT, read_state
from tests.stack.commands import likeness

SECONDS = 600
PROGRAMS = [path for name in ("initdb", "pg_ctl", "psql") if (path := shutil.which(name))]
pytestmark = [
    pytest.mark.skipif(len(PROGRAMS) < 3, reason="PostgreSQL is not installed (Debian: apt install postgresql)"),
    pytest.mark.timeout(SECONDS),
]


def as_postgres(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a program of PostgreSQL, which refuses to run as root."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    return subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=120, check=True, cwd="/")


@pytest.fixture
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A new database on loopback, whose password holds characters that an address must encode."""
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


def test_the_stack_keeps_its_state_in_postgres_and_shows_no_password(tmp_path: Path, database_url: str) -> None:
    words = ["--prefect-port", "0", "--mlflow-port", "0", "--reports-port", "0"]
    up = likeness(tmp_path, "up", *words, "--postgres", database_url)
    try:
        assert up.returncode == 0, up.stderr
        server = read_state(tmp_path / "runs").find(PREFECT)
        assert server is not None
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}/api", timeout=60, trust_env=False) as client:
            found = client.post("/deployments/filter", json={}).json()
            assert "personalize-many" in {deployment["name"] for deployment in found}
        assert list((tmp_path / "runs").rglob("prefect.db")) == []
        logs = [path.read_text(errors="replace") for path in (tmp_path / "runs" / "stack" / "logs").iterdir()]
        for text in (up.stdout, up.stderr, *logs):
            assert "p%40ss" not in text
            assert "p@ss" not in text
    finally:
        down = likeness(tmp_path, "down")
    assert "Prefect server" in down.stdout, down.stderr


def test_an_unreachable_database_is_one_line_and_leaves_nothing_running(tmp_path: Path, free_port: int) -> None:
    url = f"postgresql+asyncpg://prefect:secret@127.0.0.1:{free_port}/none"
    up = likeness(tmp_path, "up", "--prefect-port", "0", "--mlflow-port", "0", "--reports-port", "0", "--postgres", url)
    assert up.returncode == 4
    assert f"the database at 127.0.0.1:{free_port} does not answer" in up.stderr
    assert up.stderr.count("\n") == 1
    assert "secret" not in up.stderr
    assert read_state(tmp_path / "runs").processes == ()
    for wrong in ("mysql://127.0.0.1/x", "postgresql+asyncpg:///x", "nonsense"):
        refused = likeness(tmp_path, "up", "--postgres", wrong)
        assert refused.returncode == 2
        assert "--postgres takes postgresql+asyncpg://HOST:PORT/DATABASE" in refused.stderr
