"""A run with an LLM provider of one's own, added by two files, and a key; it keeps the weights of several steps."""

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.mini.vision_server.launch import LocalServer
from tests.support.cli_sandbox import CliSandbox

CANARY = "sk-canary-6c1f0b7e"
WORDS = (
    "llm=mine",
    "training.validation.validation_steps=2", "training.validation.keep=best", "training.validation.save_top_k=2",
    "evaluation.num_candidate_images=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def watched(sandbox: CliSandbox, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run's summary, what it printed, and every word of its processes' command lines."""
    server = LocalServer(tmp_path_factory.mktemp("server") / "log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_KEY", CANARY)
        patch.setenv("LIKENESS_CONF", str(add_provider(tmp_path_factory.mktemp("our conf"), server.start())))
        process = sandbox.start(*WORDS)
        told: set[str] = set()
        try:
            while process.poll() is None:
                told |= list_words(process.pid)
                time.sleep(0.2)
            printed = "".join(process.communicate())
        finally:
            server.stop()
    assert process.returncode == 0, printed[-3000:]
    return {"summary": sandbox.newest(), "printed": printed, "words": told}


def add_provider(folder: Path, base_url: str) -> Path:
    """Write the two files that a new LLM provider is, into an operator's folder of options."""
    (folder / "llm" / "profile").mkdir(parents=True)
    (folder / "llm" / "profile" / "mine.yaml").write_text(
        f"base_url: {base_url}\nmodel: mini-vision\napi_key_variable: SOME_KEY\n"
        'prices: {input: 0.0, output: 0.0, date: "2026-11-24"}\n'
    )
    (folder / "llm" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /llm/profile@llm.profiles.mine: mine\n"
        "llm: {models: [mine]}\nscoring: {executor: sync}\n"
    )
    return folder


def list_words(pid: int) -> set[str]:
    """Return the arguments of all processes below one; those that end meanwhile are passed over."""
    words: set[str] = set()
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return words
    for child in children:
        with contextlib.suppress(psutil.Error):
            words.update(child.cmdline())
    return words


def holds(path: Path, text: str) -> bool:
    """Whether a file has a text; a database's journals come and go."""
    try:
        return text.encode() in path.read_bytes()
    except FileNotFoundError:
        return False


def test_the_api_key_is_in_no_file_database_log_or_process_argument(
    watched: dict[str, Any], sandbox: CliSandbox
) -> None:
    assert any("tasks.training.process.worker" in word for word in watched["words"])  # it was looked at while it ran
    assert CANARY not in watched["printed"] + " ".join(watched["words"])
    files = [path for path in sandbox.folder.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert any(path.name == "prefect.db" for path in files)
    assert [path for path in files if holds(path, CANARY)] == []


def test_retained_checkpoints_are_compared_pairwise_and_usable_for_sampling(
    watched: dict[str, Any], sandbox: CliSandbox
) -> None:
    summary = watched["summary"]
    ranks = summary["checkpoints"]
    assert len(ranks) == 2
    assert sum(rank["strength"] for rank in ranks) == pytest.approx(1)
    [other] = [rank["step"] for rank in ranks if not rank["is_published"]]
    report = (sandbox.output / summary["run_id"] / "report.html").read_text()
    assert "Checkpoint comparison" in report
    words = ["generate", summary["run_id"], "a photo of sks fish", "--candidate", str(other), "--steps", "2"]
    done = sandbox.likeness(*words)
    assert done.returncode == 0, done.stderr
