"""Runs that are cut off: nothing computed or paid for is lost, and the next run continues."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from flows.runs.records import read_summary
from tests.support.cli_sandbox import CliSandbox
from tests.support.llm_server import JudgeRun, scripted_server
from tests.support.tiny import draw_photos


def wait_until(happened: Callable[[], bool], *, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def count_lines(pattern: str, folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob(pattern))


def read_outcomes(ledger: Path) -> list[str]:
    return [json.loads(line)["outcome"] for line in ledger.read_text().splitlines()]


def find_children(pid: int, word: str) -> list[psutil.Process]:
    try:
        children = psutil.Process(pid).children(recursive=True)
        return [child for child in children if word in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def test_a_run_killed_during_training_leaves_no_process_and_resumes_on_an_empty_disk(
    first_run: dict[str, Any], sandbox: CliSandbox
) -> None:
    words = ["seed=97", "training.max_train_steps=40", "training.checkpointing_steps=2"]
    process = sandbox.start(*words)
    stored = "store/03-training/*/resume/checkpoints/*/manifest.json"
    wait_until(lambda: process.poll() is not None or bool(list(sandbox.output.glob(stored))))
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    shutil.rmtree(sandbox.output / "work" / "training")  # as on another machine, which sees the store alone
    killed = sandbox.newest()
    assert killed["status"] == "killed"
    done = sandbox.likeness("resume", killed["run_id"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fetched the checkpoint of step" in done.stderr
    assert list(sandbox.output.glob("store/03-training/*/resume/**/*.safetensors")) == []
    summary = sandbox.newest()
    assert summary["stages"]["prior"]["cached"]
    assert summary["stages"]["subject"]["cached"]
    assert 0 < summary["training_steps"] < 40
    assert summary["stages"]["training"]["counts"]["resumed_from_step"] == 40 - summary["training_steps"]
    assert read_summary(sandbox.output / killed["run_id"]).resumed_by == summary["run_id"]
    again = sandbox.likeness("resume", killed["run_id"])
    assert again.returncode == 2
    assert f"is resumed by {summary['run_id']}" in again.stderr


def test_sigterm_saves_a_checkpoint_and_prints_how_to_resume(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    words = ["seed=98", "training.max_train_steps=400", "training.checkpointing_steps=400"]
    process = sandbox.start(*words)
    work = sandbox.output / "work" / "training"
    wait_until(lambda: process.poll() is not None or count_lines("*/losses.jsonl", work) > 0)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "stopped; run the same command again to resume"
    assert list(work.glob("*/checkpoints/step-*"))


def test_a_killed_vision_server_is_a_one_line_error_and_no_request_is_repeated(sandbox: CliSandbox) -> None:
    draw_photos(sandbox.folder / "fish photos", num=4, seed=21, size=256)
    words = [
        "subject.source=fish photos", "subject.class_noun=fish", "prior=none", "training.max_train_steps=1",
        "llm.profiles.local.concurrency=1", "output_dir=other runs",
    ]  # fmt: skip
    output = sandbox.folder / "other runs"
    process = sandbox.start(*words)
    wait_until(lambda: process.poll() is not None or count_lines("*/ledger.jsonl", output) >= 2)
    for child in find_children(process.pid, "tasks.mini.vision_server"):
        child.kill()
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 4, stderr
    assert "ServiceUnavailable: the mini vision server does not answer" in stderr.splitlines()[-1]
    [first] = output.glob("*/ledger.jsonl")
    answered = read_outcomes(first).count("ok")
    assert answered >= 2
    again = sandbox.start(*words)

    def list_replies() -> list[str]:
        newest = sorted(output.glob("*/ledger.jsonl"))[-1]
        return [] if newest == first else read_outcomes(newest)

    wait_until(lambda: again.poll() is not None or len(list_replies()) > answered)
    again.kill()  # the rest of the run would show nothing more
    _, stderr = again.communicate()
    # One request at a time, so in order: what was answered is not asked again, and the next one is.
    assert list_replies()[: answered + 1] == [*["cached"] * answered, "ok"], stderr


def test_a_run_killed_during_its_batch_job_resumes_with_the_same_job_and_its_cost_covers_all_attempts(
    first_run: dict[str, Any], sandbox: CliSandbox
) -> None:
    with scripted_server(JudgeRun()) as server:
        words = [
            f"llm.profiles.remote.base_url={server.url}", "llm.profiles.remote.model=asked-model", "llm.judge=remote",
            "llm.profiles.remote.capabilities.response_format=json_schema",
            "llm.profiles.remote.capabilities.batch=openai", "llm.profiles.remote.prices.input=1",
            "llm.profiles.remote.prices.output=10", "llm.profiles.remote.prices.date=d",
            # Long enough to be killed meanwhile.
            "scoring.max_wait_seconds=20", "scoring.poll_seconds=0.1",
        ]  # fmt: skip
        server.batch_api.turn.acquire()  # the provider is busy
        process = sandbox.start(*words)
        wait_until(lambda: process.poll() is not None or bool(server.batch_api.list_batches()))
        wait_until(lambda: bool(list(sandbox.output.glob("*/jobs.jsonl"))))
        [batch] = server.batch_api.list_batches()
        states = "store/05-scoring/*/batches/*/*.json"
        wait_until(lambda: any(batch["id"] in path.read_text() for path in sandbox.output.glob(states)))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        killed = sorted(path.parent for path in sandbox.output.glob("*/jobs.jsonl"))[-1]
        assert read_summary(killed).status == "killed"
        listed = sandbox.likeness("jobs", "list")
        assert batch["id"] in listed.stdout, listed.stderr
        busy = sandbox.likeness("pending")
        assert busy.stdout.strip().endswith("0 of 1 pending runs finished"), busy.stderr
        assert busy.returncode == 11
        waiting = sandbox.newest()
        assert waiting["status"] == "pending"
        assert "still validating" in waiting["error"]["message"]
        server.batch_api.turn.release()
        wait_until(lambda: all(batch["status"] == "completed" for batch in server.batch_api.list_batches()))
        done = sandbox.likeness("pending")
        assert done.stdout.strip().endswith("1 of 1 pending runs finished"), done.stderr
        assert (done.returncode, server.counts["POST /v1/batches"]) == (0, 1), done.stderr
    summary = sandbox.newest()
    assert summary["status"] == "finished"
    assert summary["scores"]["tuned"]["concept_preservation"] == 3
    assert not summary["judge"]["is_reliable"]
    assert "no pending runs in runs" in sandbox.likeness("pending").stdout
    assert json.loads((killed / "summary.json").read_text())["status"] == "resumed"
    cost = sandbox.likeness("cost", killed.name)
    assert cost.returncode == 0, cost.stderr
    assert "resumed" in cost.stdout
    assert summary["run_id"] in cost.stdout
