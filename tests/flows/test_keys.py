"""A provider's key goes to the provider, and nowhere else."""

from pathlib import Path

import psutil
import pytest

from tasks.mini.launch import LocalServer
from tests.workplace import Workplace

CANARY = "sk-canary-6c1f0b7e"


def test_a_key_is_in_no_file_database_log_or_process_argument(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", CANARY)
    server = LocalServer(tmp_path / "log")
    words = ["llm=vllm", "llm.profiles.vllm.model=mini-vision", "llm.profiles.vllm.api_key_variable=SOME_KEY"]
    try:
        process = workplace.start(*words, f"llm.profiles.vllm.base_url={server.start()}")
        told: set[str] = set()
        while process.poll() is None:
            for one in psutil.Process(process.pid).children(recursive=True):
                try:
                    told.update(one.cmdline())
                except psutil.Error:
                    continue
            psutil.wait_procs([], timeout=0.2)
        said, complained = process.communicate()
    finally:
        server.stop()
    assert process.returncode == 0, complained[-3000:]
    assert any("tasks.training.worker" in word for word in told)  # it was looked at while it ran
    assert CANARY not in said + complained + " ".join(told)
    files = [path for path in workplace.folder.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert any(path.name == "prefect.db" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
