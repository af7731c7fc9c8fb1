"""One layer retries: the exact number of requests in the worst case, counted at the server."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import BudgetExceeded, ConfigError, LikenessError, ReplyInvalid, ServiceUnavailable
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge import ask_judge, check_failures
from tasks.services.llm.config import CapabilityConfig
from tasks.services.llm.executor import AskOptions, ask_each
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.llm import CHAT, GOOD, SPEC, ask, make_llm
from tests.support.llm_batch import ask_in_batch, make_batching
from tests.support.llm_server import Answer, ScriptedServer, scripted_server

QUESTIONS = {f"q{number}": replace(SPEC, repeat=number) for number in range(21)}
FATAL: dict[str, tuple[Answer, type[LikenessError]]] = {
    "a wrong key": ((401, {}, b"{}"), ConfigError),
    "a forbidden key": ((403, {}, b"{}"), ConfigError),
    "no quota": ((429, {}, b'{"error": {"code": "insufficient_quota"}}'), BudgetExceeded),
    "no money": ((402, {}, b"{}"), BudgetExceeded),
    "a long wait": ((429, {"retry-after": "600"}, b"{}"), ServiceUnavailable),
    "an unknown model": ((404, {}, b"{}"), ConfigError),
}


class FailingLater(ScriptedServer):
    """Gives so many good answers, then one failure for ever."""

    def __init__(self, num_good: int, failure: Answer) -> None:
        super().__init__()
        self.num_good, self.failure = num_good, failure

    def next_answer(self) -> Any:
        return super().next_answer() if self.counts[CHAT] <= self.num_good else self.failure


def ask_all(server: ScriptedServer, folder: Path, **changes: Any) -> Any:
    llm = make_llm(server, folder, concurrency=4, **changes)
    return ask_each(llm, QUESTIONS, AskOptions("judge"))


@pytest.mark.parametrize(("answer", "error"), FATAL.values(), ids=FATAL.keys())
def test_a_fatal_error_on_the_first_request_sends_no_further_request(
    server: ScriptedServer, tmp_path: Path, answer: Answer, error: type[LikenessError]
) -> None:
    server.script(answer)
    with pytest.raises(error):
        ask_all(server, tmp_path)
    assert server.counts[CHAT] == 1


@pytest.mark.parametrize(("answer", "error"), FATAL.values(), ids=FATAL.keys())
def test_a_fatal_error_stops_all_workers(tmp_path: Path, answer: Answer, error: type[LikenessError]) -> None:
    with scripted_server(FailingLater(5, answer)) as server:
        server.script(GOOD)
        with pytest.raises(error):
            ask_all(server, tmp_path)
        assert 6 <= server.counts[CHAT] <= 5 + 4  # one for each worker that had begun


def test_a_permanently_failing_server_gets_the_attempts_of_one_request(server: ScriptedServer, tmp_path: Path) -> None:
    server.script((500, {"retry-after": "0"}, b"{}"))
    with pytest.raises(ServiceUnavailable):
        ask_all(server, tmp_path, max_attempts=4)
    assert server.counts[CHAT] == 4


def test_a_server_that_starts_failing_is_probed_by_one_worker(tmp_path: Path) -> None:
    with scripted_server(FailingLater(5, (500, {"retry-after": "0"}, b"{}"))) as server:
        server.script(GOOD)
        with pytest.raises(ServiceUnavailable):
            ask_all(server, tmp_path, max_attempts=4)
        assert 5 + 4 <= server.counts[CHAT] <= 5 + 4 + (4 - 1)


def test_all_requests_succeed_after_the_server_recovers(server: ScriptedServer, tmp_path: Path) -> None:
    server.script(GOOD, GOOD, (500, {"retry-after": "0"}, b"{}"), (503, {"retry-after": "0"}, b"{}"), GOOD)
    answers, failures = ask_all(server, tmp_path)
    assert (len(answers), failures) == (21, {})
    assert server.counts[CHAT] == 21 + 2


@pytest.mark.parametrize(("fraction", "most"), [(0.0, 21), (0.25, 21 + 6), (1.0, 42)])
def test_max_repair_fraction_bounds_the_repairs_across_all_requests(
    server: ScriptedServer, tmp_path: Path, fraction: float, most: int
) -> None:
    server.script('{"grade": 9}')
    llm = make_llm(server, tmp_path)
    llm.config = llm.config.model_copy(update={"max_repair_fraction": fraction})
    answers, failures = ask_each(llm, QUESTIONS, AskOptions("judge"))
    assert (len(answers), len(failures), server.counts[CHAT]) == (0, 21, most)


def test_too_many_invalid_judge_replies_stop_scoring_early(server: ScriptedServer, tmp_path: Path) -> None:
    server.script('{"grade": 9}')
    config = make_config(ScoringConfig, executor="sync", max_failed_fraction=0.1)
    llm = make_llm(server, tmp_path, concurrency=1)
    folder = StageFolder(llm.store, "scoring", "k")
    _, failures = ask_judge(llm, QUESTIONS, config, folder=folder, options=AskOptions("judge"))
    with pytest.raises(ReplyInvalid, match="21 of 21 judge requests failed"):
        check_failures(config, failures, num_requests=len(QUESTIONS))
    assert server.counts[CHAT] == 3 * 2  # a third failure is too many; each was asked once more


def test_prefect_tasks_that_call_an_llm_have_no_retries_of_their_own() -> None:
    from tasks.scoring.steps import score_samples
    from tasks.subject.steps import prepare_subject

    assert (prepare_subject.retries, score_samples.retries) == (0, 0)


@pytest.mark.parametrize(("answer", "error"), FATAL.values(), ids=FATAL.keys())
def test_a_fatal_error_stops_the_local_batch_runner(
    server: ScriptedServer, tmp_path: Path, answer: Answer, error: type[LikenessError]
) -> None:
    server.script(answer)
    with pytest.raises(error):
        ask_in_batch(make_batching(server, tmp_path, "local"))
    assert server.counts[CHAT] == 1


def test_a_permanently_failing_row_stops_its_job_only_once(tmp_path: Path) -> None:
    class Poisoned(ScriptedServer):
        def next_answer(self) -> Any:
            is_poison = "sample 2" in json.dumps(self.bodies[-1])
            return (500, {"retry-after": "0"}, b"{}") if is_poison else super().next_answer()

    with scripted_server(Poisoned()) as server:
        server.script(GOOD)
        with pytest.raises(ServiceUnavailable):
            ask_in_batch(make_batching(server, tmp_path, "local", concurrency=1))
        answers, failures = ask_in_batch(make_batching(server, tmp_path, "local", concurrency=1))
        assert (len(answers), list(failures)) == (3, ["s2"])


def test_a_rejected_capability_probe_stops_no_worker(tmp_path: Path) -> None:
    class Picky(ScriptedServer):
        """Knows no JSON schema."""

        def next_answer(self) -> Any:
            if "json_schema" in json.dumps(self.bodies[-1].get("response_format")):
                return 400, {}, b"{}"
            is_probe = "vermilion" in json.dumps(self.bodies[-1])
            self.script('{"color": "vermilion"}' if is_probe else GOOD)
            return super().next_answer()

    with scripted_server(Picky()) as server:
        answers, failures = ask_all(server, tmp_path, capabilities=CapabilityConfig(response_format="auto"))
        assert (len(answers), failures) == (21, {})
        assert server.counts[CHAT] == 21 + 2


def test_concurrent_identical_requests_are_paid_once(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path)
    ask(llm)  # the circuit is closed: calls flow
    again = replace(SPEC, repeat=1)
    grades: list[int] = []
    server.asking.acquire()
    threads = [
        threading.Thread(target=lambda: grades.append(llm.ask(again, role="judge").reply.grade)) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # all of them ask before any is answered
    server.asking.release()
    for thread in threads:
        thread.join()
    assert (grades, server.counts[CHAT]) == ([2] * 5, 1 + 1)
    assert sorted(row.outcome for row in llm.ledger.rows) == ["cached"] * 4 + ["ok"] * 2
