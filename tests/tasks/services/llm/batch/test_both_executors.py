"""A question that was asked by call is in no batch job, and one that a job answers is not asked by call."""

import time
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import StillPending
from tasks.mini.vision_server.batch_api import InMemoryBatchApi
from tasks.services.llm.batch.jobs import BatchOptions, ask_many
from tasks.services.llm.executor import AskOptions
from tasks.services.llm.service import LlmService
from tests.support.llm import CHAT, PRICES, make_llm
from tests.support.llm_batch import BATCHES, SPECS, ask_in_batch
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


def test_a_job_of_other_questions_stays_as_it_is(server: ScriptedServer, tmp_path: Path) -> None:
    with server.batch_api.turn:
        with pytest.raises(StillPending):
            ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.1)
        assert len(ask_by_calls(make_llm(server, tmp_path), SOME)[0]) == 2
        assert server.batch_api.list_batches()[0]["status"] == "validating"
