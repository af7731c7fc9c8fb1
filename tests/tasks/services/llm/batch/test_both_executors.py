"""A question that was asked by call is in no batch job, and one that a job answers is not asked by call."""

import time
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError, ServiceUnavailable, StillPending
from tasks.mini.vision_server.batch_api import BatchApiError, InMemoryBatchApi
from tasks.services.llm.batch.job import list_states
from tasks.services.llm.batch.jobs import BatchOptions, ask_many
from tasks.services.llm.budget.spending_cap import Budget, BudgetState
from tasks.services.llm.executor import AskOptions
from tasks.services.llm.service import LlmService
from tasks.stage.digests import dump_signed
from tests.support.llm import CHAT, PRICES, make_llm
from tests.support.llm_batch import BATCHES, SPECS, Cut, ask_in_batch, cut_after, make_batching
from tests.support.llm_server import ScriptedServer

PREFIX = "05-scoring/k/batches"
SOME = {name: SPECS[name] for name in list(SPECS)[:2]}


def ask_by_calls(llm: LlmService, specs: Any = SPECS) -> Any:
    batch = BatchOptions(PREFIX, poll_seconds=0.02, max_wait_seconds=20, is_enabled=False)
    return ask_many(llm, specs, AskOptions("judge"), batch=batch)


def count_paid(server: ScriptedServer) -> tuple[int, int, int]:
    """Return calls, jobs, and rows of jobs that were answered."""
    return server.counts[CHAT], server.counts[BATCHES], server.counts["row"]


def list_paid(*services: LlmService) -> list[bool]:
    """Return for each paid question whether a job answered it, as the ledgers say."""
    return sorted(row.is_batch for llm in services for row in llm.ledger.rows if row.outcome == "ok")


class SlowBatchApi(InMemoryBatchApi):
    """Answers two rows of a job, and a third one while it is being cancelled."""

    def run_row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        [batch] = self.list_batches()
        while batch["request_counts"]["completed"] == 2 and batch["status"] != "cancelling":
            time.sleep(0.01)
        return super().run_row(row)


class RefusingBatchApi(InMemoryBatchApi):
    """Serves a key that may not use batch jobs."""

    def list_batches(self, **page: Any) -> Any:
        raise BatchApiError(403, "this key may not use batches")


class OddBatchApi(SlowBatchApi):
    """Describes a job with a status that nobody knows while it is at work."""

    def retrieve(self, batch_id: str) -> dict[str, Any]:
        found = super().retrieve(batch_id)
        return found if found["status"] in ("completed", "cancelled") else {**found, "status": "queued"}

    def cancel(self, batch_id: str) -> dict[str, Any]:
        self.batches[batch_id]["status"] = "cancelling"
        return self.retrieve(batch_id)


class FullBatchApi(InMemoryBatchApi):
    """Has no room for the tokens of any job."""

    def retrieve(self, batch_id: str) -> dict[str, Any]:
        fault = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
        return {**super().retrieve(batch_id), "status": "failed", "output_file_id": None, "errors": {"data": [fault]}}


class DownBatchApi(InMemoryBatchApi):
    """Knows of no job what became of it."""

    def retrieve(self, batch_id: str) -> dict[str, Any]:
        raise BatchApiError(503, "down")


def test_a_batch_run_after_one_by_calls_pays_nothing(server: ScriptedServer, tmp_path: Path) -> None:
    ask_by_calls(make_llm(server, tmp_path, prices=PRICES))
    llm = make_llm(server, tmp_path, prices=PRICES)
    answers, failures = ask_in_batch(llm)
    assert (len(answers), failures) == (4, {})
    assert count_paid(server) == (4, 0, 0)
    assert [row.outcome for row in llm.ledger.rows] == ["cached"] * 4
    assert llm.ledger.sum_cost() == 0


def test_a_run_by_calls_after_a_batch_run_pays_nothing(server: ScriptedServer, tmp_path: Path) -> None:
    ask_in_batch(make_llm(server, tmp_path, prices=PRICES))
    llm = make_llm(server, tmp_path, prices=PRICES)
    answers, failures = ask_by_calls(llm)
    assert (len(answers), failures) == (4, {})
    assert count_paid(server) == (0, 1, 4)
    assert [row.outcome for row in llm.ledger.rows] == ["cached"] * 4
    assert llm.ledger.sum_cost() == 0


def test_a_job_holds_only_what_no_call_has_answered(server: ScriptedServer, tmp_path: Path) -> None:
    ask_by_calls(make_llm(server, tmp_path), SOME)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})
    assert count_paid(server) == (2, 1, 2)


def test_a_run_by_calls_cancels_a_job_that_is_left_and_asks_only_what_it_has_not_answered(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.batch_api = SlowBatchApi(server.answer_row)
    first = make_llm(server, tmp_path, prices=PRICES)
    with pytest.raises(StillPending):
        ask_in_batch(first, max_wait_seconds=0.3)
    llm = make_llm(server, tmp_path, prices=PRICES)
    answers, failures = ask_by_calls(llm)
    assert (len(answers), failures) == (4, {})
    assert count_paid(server) == (1, 1, 3)
    assert list_paid(first, llm) == [False, True, True, True]
    # The job is done with: neither kind of run asks or pays again.
    assert len(ask_in_batch(make_llm(server, tmp_path))[0]) == 4
    assert len(ask_by_calls(make_llm(server, tmp_path))[0]) == 4
    assert count_paid(server) == (1, 1, 3)


def test_a_run_by_calls_takes_the_replies_of_a_job_that_has_ended_meanwhile(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with server.batch_api.turn, pytest.raises(StillPending):
        ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.1)
    while server.batch_api.list_batches()[0]["status"] != "completed":
        time.sleep(0.01)
    answers, failures = ask_by_calls(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})
    assert count_paid(server) == (0, 1, 4)


@pytest.mark.parametrize("num_saves", [1, 2], ids=["planned", "uploaded"])
def test_a_run_by_calls_submits_no_job_that_an_earlier_run_only_planned(
    server: ScriptedServer, tmp_path: Path, num_saves: int
) -> None:
    cut = make_llm(server, tmp_path, prices=PRICES)
    cut_after(cut, num_saves)
    with pytest.raises(Cut):
        ask_in_batch(cut)
    answers, failures = ask_by_calls(make_llm(server, tmp_path, prices=PRICES))
    assert (len(answers), failures) == (4, {})
    assert count_paid(server) == (4, 0, 0)
    assert len(ask_in_batch(make_llm(server, tmp_path))[0]) == 4  # nor does a later one
    assert count_paid(server) == (4, 0, 0)


def test_a_run_by_calls_finds_the_job_that_a_killed_run_submitted_and_did_not_record(
    server: ScriptedServer, tmp_path: Path
) -> None:
    first = make_llm(server, tmp_path)
    with server.batch_api.turn, pytest.raises(StillPending):
        ask_in_batch(first, max_wait_seconds=0.1)
    [state] = list_states(first.store, PREFIX)
    forgotten = state.model_copy(update={"batch_id": "", "status": "submitting"})
    first.store.put_bytes(f"{PREFIX}/{state.file_name}", dump_signed(forgotten))
    while server.batch_api.list_batches()[0]["status"] != "completed":
        time.sleep(0.01)
    answers, failures = ask_by_calls(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})
    assert count_paid(server) == (0, 1, 4)


def test_a_run_by_calls_asks_what_a_lost_job_has_not_answered_and_keeps_its_reservation(
    server: ScriptedServer, tmp_path: Path
) -> None:
    first = make_llm(server, tmp_path, prices=PRICES)
    first.budget = Budget(tmp_path / "budget.json", 1.0)
    with server.batch_api.turn, pytest.raises(StillPending):
        ask_in_batch(first, max_wait_seconds=0.1)
    [state] = list_states(first.store, PREFIX)
    server.batch_api = InMemoryBatchApi(server.answer_row)  # as after the provider's months
    llm = make_llm(server, tmp_path, prices=PRICES)
    llm.budget = first.budget
    assert len(ask_by_calls(llm)[0]) == 4
    assert count_paid(server)[:2] == (4, 1)
    kept = BudgetState.model_validate_json((tmp_path / "budget.json").read_bytes())
    assert kept.reserved == {state.reservation: state.reserved_usd}  # it may be billed


def test_where_the_batch_api_is_down_a_run_by_calls_says_how_to_give_the_job_up(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with server.batch_api.turn, pytest.raises(StillPending):
        ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.1)
    server.batch_api = DownBatchApi(server.answer_row)
    with pytest.raises(ServiceUnavailable, match="can't be ended: .*; `likeness jobs discard` gives it up"):
        ask_by_calls(make_llm(server, tmp_path, max_attempts=1))
    assert server.counts[CHAT] == 0


def test_where_the_key_may_not_use_batches_a_run_by_calls_asks_all(server: ScriptedServer, tmp_path: Path) -> None:
    server.batch_api = RefusingBatchApi(server.answer_row)
    with pytest.raises(ConfigError, match="may not use batches"):
        ask_in_batch(make_llm(server, tmp_path))
    assert len(ask_by_calls(make_llm(server, tmp_path))[0]) == 4
    assert count_paid(server) == (4, 0, 0)


def test_a_run_by_calls_waits_for_the_end_of_a_job_whose_status_is_unknown(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.batch_api = OddBatchApi(server.answer_row)
    with pytest.raises(StillPending):
        ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.3)
    assert len(ask_by_calls(make_llm(server, tmp_path))[0]) == 4
    assert count_paid(server) == (1, 1, 3)


def test_a_run_by_calls_splits_no_job_that_is_over_the_limit(server: ScriptedServer, tmp_path: Path) -> None:
    with server.batch_api.turn, pytest.raises(StillPending):
        ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.1)
    full = FullBatchApi(server.answer_row)
    full.batches = server.batch_api.batches
    server.batch_api = full
    assert len(ask_by_calls(make_llm(server, tmp_path))[0]) == 4
    assert count_paid(server)[:2] == (4, 1)


def test_a_program_is_not_run_for_a_run_by_calls(server: ScriptedServer, tmp_path: Path) -> None:
    program = ["python3", "-c", "import sys; sys.exit(3)"]
    failing = make_batching(server, tmp_path, "file", batch_command=program)
    with pytest.raises(ServiceUnavailable, match="ended with 3"):
        ask_in_batch(failing)
    assert len(ask_by_calls(make_batching(server, tmp_path, "file", batch_command=program))[0]) == 4
    assert count_paid(server) == (4, 0, 0)


def test_a_job_of_other_questions_stays_as_it_is(server: ScriptedServer, tmp_path: Path) -> None:
    with server.batch_api.turn:
        with pytest.raises(StillPending):
            ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.1)
        assert len(ask_by_calls(make_llm(server, tmp_path), SOME)[0]) == 2
        assert server.batch_api.list_batches()[0]["status"] == "validating"
