"""Batch jobs by xAI's protocol, by a program, and by ourselves: the same answers, nothing paid twice."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError, ServiceUnavailable, StillPending
from tasks.services.llm.batch import xai_api as batch_xai
from tests.support.llm import CHAT, GOOD
from tests.support.llm_batch import SPECS, Cut, ask_in_batch, cut_after, make_batching
from tests.support.llm_server import ScriptedServer, scripted_server
from tests.support.xai_server import XaiServer, xai_server

RUNNER = """
import json, sys
source, target = sys.argv[1:]
with open(target, "w") as out:
    for line in open(source):
        row = json.loads(line)
        message = {"role": "assistant", "content": '{"grade": 2}'}
        body = {"model": "asked-model", "choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}
        told = {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}
        print(json.dumps(told), file=out)
"""


@pytest.fixture
def server() -> Iterator[XaiServer]:
    with xai_server() as running:
        yield running


def test_an_xai_batch_is_filled_and_its_results_are_read_by_page(server: XaiServer, tmp_path: Path) -> None:
    answers, failures = ask_in_batch(make_batching(server, tmp_path, "xai"))
    assert {name: answer.reply.grade for name, answer in answers.items()} == dict.fromkeys(SPECS, 2)
    assert failures == {}
    assert (server.counts["create"], server.counts["row"], server.counts["page"]) == (1, 4, 2)
    [batch] = server.batches.values()
    assert batch["name"].startswith("likeness-")
    ask_in_batch(make_batching(server, tmp_path, "xai"))
    assert (server.counts["create"], server.counts["row"]) == (1, 4)


def test_xai_rows_over_the_size_limit_are_added_in_several_requests(
    server: XaiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_xai, "XAI_MAX_BYTES", 1500)
    answers, _ = ask_in_batch(make_batching(server, tmp_path, "xai"))
    assert len(answers) == 4
    assert (server.counts["create"], server.counts["row"]) == (1, 4)
    assert server.counts["add"] > 1


@pytest.mark.parametrize("number", range(1, 9))
def test_an_xai_job_interrupted_at_any_saved_state_resumes(server: XaiServer, tmp_path: Path, number: int) -> None:
    llm = make_batching(server, tmp_path, "xai")
    cut_after(llm, number)
    with pytest.raises(Cut):
        ask_in_batch(llm)
    answers, _ = ask_in_batch(make_batching(server, tmp_path, "xai"))
    assert len(answers) == 4
    assert (server.counts["create"], server.counts["row"]) == (1, 4)


def test_a_partially_filled_xai_batch_is_completed(
    server: XaiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_xai, "XAI_MAX_BYTES", 1)
    add = server.add

    def add_and_die(batch_id: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        add(batch_id, rows)
        raise ConnectionError  # the row is there, the answer never comes

    server.add = add_and_die  # type: ignore[method-assign]
    with pytest.raises(ServiceUnavailable):
        ask_in_batch(make_batching(server, tmp_path, "xai", max_attempts=1))
    server.add = add  # type: ignore[method-assign]
    answers, _ = ask_in_batch(make_batching(server, tmp_path, "xai"))
    assert len(answers) == 4
    assert (server.counts["create"], server.counts["row"]) == (1, 4)


def test_failed_xai_rows_and_unfinished_xai_jobs_are_reported(server: XaiServer, tmp_path: Path) -> None:
    server.is_busy = True
    with pytest.raises(StillPending, match="batch_0 is still in_progress"):
        ask_in_batch(make_batching(server, tmp_path, "xai"), max_wait_seconds=0.1)
    server.is_busy = False
    server.answer = lambda body: "" if "sample 1" in json.dumps(body) else GOOD
    answers, failures = ask_in_batch(make_batching(server, tmp_path, "xai"))
    assert (sorted(answers), failures) == (["s0", "s2", "s3"], {"s1": "the row failed"})
    assert server.counts["create"] == 1


def test_an_xai_batch_unknown_to_the_provider_is_created_again(server: XaiServer, tmp_path: Path) -> None:
    server.is_busy = True
    with pytest.raises(StillPending):
        ask_in_batch(make_batching(server, tmp_path, "xai"), max_wait_seconds=0.1)
    server.batches.clear()
    server.rows.clear()
    server.is_busy = False
    answers, _ = ask_in_batch(make_batching(server, tmp_path, "xai"))
    assert len(answers) == 4
    assert (server.counts["create"], server.counts["row"]) == (2, 8)


def test_a_batch_command_processes_the_input_file(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text(RUNNER)
    command = (sys.executable, str(tmp_path / "runner.py"), "{input}", "{output}")
    with scripted_server() as server:
        answers, failures = ask_in_batch(make_batching(server, tmp_path, "file", batch_command=command))
        assert not server.counts
    assert (len(answers), failures) == (4, {})


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ((sys.executable, "-c", "import sys; sys.exit(3)"), ServiceUnavailable, "ended with 3; see .*log"),
        (("no-such-program",), ConfigError, "no-such-program can't be started"),
    ],
)
def test_a_failing_batch_command_is_named_in_the_error(
    tmp_path: Path, command: tuple[str, ...], error: Any, message: str
) -> None:
    with scripted_server() as server, pytest.raises(error, match=message):
        ask_in_batch(make_batching(server, tmp_path, "file", batch_command=command))


def test_the_local_batch_runner_resumes_and_repeats_no_completed_row(tmp_path: Path) -> None:
    class Dying(ScriptedServer):
        def next_answer(self) -> Any:
            if self.counts[CHAT] == 3:
                return 401, {}, b"{}"
            return super().next_answer()

    with scripted_server(Dying()) as server:
        server.script(GOOD)
        with pytest.raises(ConfigError):
            ask_in_batch(make_batching(server, tmp_path, "local", concurrency=1))
        assert server.counts[CHAT] in (3, 4)
        answers, failures = ask_in_batch(make_batching(server, tmp_path, "local", concurrency=1))
        assert (len(answers), failures) == (4, {})
        assert server.counts[CHAT] == 5


def test_a_crash_before_the_output_is_renamed_sends_no_row_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with scripted_server() as server:
        server.script(GOOD)
        with monkeypatch.context() as patched:
            patched.setattr("tasks.services.llm.batch.local.os.replace", crash)
            llm = make_batching(server, tmp_path, "local")
            with pytest.raises(KeyboardInterrupt):
                ask_in_batch(llm)
        answers, failures = ask_in_batch(make_batching(server, tmp_path, "local"))
        assert (len(answers), failures, server.counts[CHAT]) == (4, {}, 4)


def test_rows_whose_response_was_lost_are_not_added_twice(server: XaiServer, tmp_path: Path) -> None:
    add = server.add

    def lose(batch_id: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        add(batch_id, rows)
        if server.counts["add"] == 1:
            raise ConnectionError("the rows are added, the response is lost")
        return {}

    server.add = lose  # type: ignore[method-assign]
    answers, failures = ask_in_batch(make_batching(server, tmp_path, "xai"))
    assert (len(answers), failures, server.counts["row"]) == (4, {}, 4)


def test_an_xai_job_past_its_deadline_is_cancelled_and_finished_synchronously(
    server: XaiServer, tmp_path: Path
) -> None:
    server.is_busy = True
    answers, failures = ask_in_batch(make_batching(server, tmp_path, "xai"), deadline_seconds=0.01)
    assert (len(answers), failures) == (4, {})
    assert (server.counts["cancel"], server.counts["chat"]) == (1, 2)


def test_all_batch_protocols_share_one_reply_cache(server: XaiServer, tmp_path: Path) -> None:
    ask_in_batch(make_batching(server, tmp_path, "xai"))
    llm = make_batching(server, tmp_path, "local")
    assert llm.ask(SPECS["s0"], role="judge").reply.grade == 2
    answers, _ = ask_in_batch(llm)
    assert len(answers) == 4
    assert server.counts["row"] == 4
