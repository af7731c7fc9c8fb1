"""`likeness jobs` and `likeness pending` over batch jobs that runs have left behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.request import RunRequest
from flows.cli.spending.cost import find_same, read_ledger
from flows.cli.spending.jobs import find_jobs, run_jobs_command
from flows.runs.pending import PendingReport, list_pending
from flows.runs.records import write_request, write_summary
from tasks.errors import ConfigError, StillPending
from tasks.manifests.run_summary import Status, make_head
from tasks.services.llm.batch.jobs import BatchOptions, ask_batch
from tasks.services.llm.budget.ledger import Ledger
from tasks.services.llm.budget.spending_cap import Budget
from tasks.services.llm.executor import AskOptions
from tasks.services.llm.service import LlmService
from tasks.services.store.local import LocalStore
from tests.support.llm import CHAT, GOOD
from tests.support.llm_batch import BATCHES, SPECS
from tests.support.llm_server import ScriptedServer, scripted_server

RUN = "20261124-120000-fish-0001"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        running.script(GOOD)
        yield running


def make_run(server: ScriptedServer, output: Path, *, name: str = RUN, **changes: Any) -> LlmService:
    """Return the services of a run, whose folder holds what a killed run leaves."""
    words = [
        f"llm.profiles.remote.base_url={server.url}", "llm.profiles.remote.model=asked-model", "llm.judge=remote",
        "llm.profiles.remote.capabilities.response_format=json_schema", "llm.profiles.remote.capabilities.batch=openai",
        "llm.profiles.remote.prices.input=1", "llm.profiles.remote.prices.output=10",
        "llm.profiles.remote.prices.date=d", f"output_dir={output}",
    ]  # fmt: skip
    request: RunRequest = parse_overrides(words)
    config = compile_request(request)
    folder = output / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    write_request(folder, request, is_trusted=True)
    return LlmService(
        config.llm,
        store=LocalStore(output / "store"),
        ledger=Ledger(folder / "ledger.jsonl"),
        budget=Budget(),
        **changes,
    )


def ask(llm: LlmService, *, max_wait_seconds: float = 20.0) -> Any:
    options = BatchOptions("05-scoring/key/batches/judge", 0.02, max_wait_seconds)
    return ask_batch(llm, SPECS, options, options=AskOptions("judge"))


@pytest.fixture
def left(server: ScriptedServer, tmp_path: Path) -> str:
    """A job that runs on; its run was killed."""
    server.batch_api.turn.acquire()
    with pytest.raises(StillPending):
        ask(make_run(server, tmp_path), max_wait_seconds=0.1)
    [job] = server.batch_api.list_batches()
    return str(job["id"])


def end(server: ScriptedServer) -> None:
    import time

    server.batch_api.turn.release()
    deadline = time.monotonic() + 30
    while any(job["status"] in ("validating", "in_progress", "finalizing") for job in server.batch_api.list_batches()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_jobs_are_listed_with_run_status_and_cost(
    server: ScriptedServer, tmp_path: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_jobs_command(tmp_path, "list", "", profile="") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{left} remote judge validating 4" in shown
    assert "at most" in shown
    assert RUN in shown
    end(server)
    assert run_jobs_command(tmp_path, "show", left, profile="") == 0
    assert f"{left}: completed, 4 of 4 rows" in capsys.readouterr().out


def test_replies_of_an_adopted_job_are_paid_once_and_cached_for_the_next_run(
    server: ScriptedServer, tmp_path: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    end(server)
    assert run_jobs_command(tmp_path, "adopt", left, profile="") == 0
    assert f"{left}: 4 replies cached" in capsys.readouterr().out
    answers, failures = ask(make_run(server, tmp_path, name="20261124-130000-fish-0002"))
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"], server.counts[CHAT]) == (1, 4, 0)


def test_a_job_unknown_to_the_output_folder_is_adopted_with_its_profile(
    server: ScriptedServer, tmp_path: Path, left: str
) -> None:
    end(server)
    other = tmp_path / "other"
    llm = make_run(server, other)
    with pytest.raises(ConfigError, match="name its LLM profile with --profile"):
        run_jobs_command(other, "adopt", left, profile="")
    assert run_jobs_command(other, "adopt", left, profile="remote") == 0
    answers, _ = ask(llm)
    assert (len(answers), server.counts[BATCHES]) == (4, 1)


def test_the_rows_of_a_cancelled_job_are_sent_as_synchronous_requests(
    server: ScriptedServer, tmp_path: Path, left: str
) -> None:
    assert run_jobs_command(tmp_path, "cancel", left, profile="") == 0
    end(server)
    answers, failures = ask(make_run(server, tmp_path, name="20261124-130000-fish-0002"))
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"], server.counts[CHAT]) == (1, 0, 4)


def test_the_rows_of_a_discarded_job_are_sent_in_a_new_job(server: ScriptedServer, tmp_path: Path, left: str) -> None:
    assert run_jobs_command(tmp_path, "discard", left, profile="") == 0
    end(server)
    answers, _ = ask(make_run(server, tmp_path, name="20261124-130000-fish-0002"))
    assert (len(answers), server.counts[BATCHES]) == (4, 2)


def test_a_job_action_without_a_job_id_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a job id"):
        run_jobs_command(tmp_path, "cancel", "", profile="")


def test_a_killed_run_is_pending_until_its_job_is_collected(server: ScriptedServer, tmp_path: Path, left: str) -> None:
    assert [[folder.name for folder in folders] for folders in list_pending(tmp_path)] == [[RUN]]
    end(server)
    ask(make_run(server, tmp_path, name="20261124-130000-fish-0002"))
    assert list_pending(tmp_path) == []
    assert [job.state.is_collected for job in find_jobs(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("summary", "is_pending"),
    [
        ("failed", True), ("cancelled", True), ('{"status": "pend', True), ("[]", True),
        ("finished", False), ("resumed", False),
    ],
)  # fmt: skip
def test_a_run_with_an_active_job_is_pending_unless_finished_or_resumed(
    server: ScriptedServer, tmp_path: Path, left: str, summary: str, is_pending: bool
) -> None:
    if summary.isalpha():
        write_summary(tmp_path / RUN, make_head(RUN, cast(Status, summary)))
    else:
        (tmp_path / RUN / "summary.json").write_text(summary)  # torn
    assert bool(list_pending(tmp_path)) is is_pending


def test_the_exit_code_distinguishes_finished_waiting_and_failed_runs() -> None:
    assert PendingReport(finished=[make_head("a", "finished")]).exit_code == 0
    assert PendingReport(finished=[make_head("a", "finished")], waiting=["a"]).exit_code == 11
    assert PendingReport(waiting=["a"], failed=["b"]).exit_code == 1


def test_costs_cover_all_runs_of_a_configuration_whatever_their_status(
    server: ScriptedServer, tmp_path: Path, left: str
) -> None:
    end(server)
    ask(make_run(server, tmp_path, name="20261124-130000-fish-0002"))
    make_run(server, tmp_path, name="20261124-140000-fish-0003")
    other = json.loads((tmp_path / RUN / "config.json").read_text())
    other["seed"] = 7
    (tmp_path / "20261124-140000-fish-0003" / "config.json").write_text(json.dumps(other))
    same = find_same(tmp_path / RUN)
    assert [folder.name for folder in same] == [RUN, "20261124-130000-fish-0002"]
    assert sum(len(read_ledger(folder)[0]) for folder in same) == 4
