"""Batch providers that send odd rows, statuses and files: nothing blocks a run, and bad rows are asked again."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ServiceUnavailable, StillPending
from tasks.mini.vision_server.batch_api import InMemoryBatchApi
from tasks.services.llm.batch.local import LocalBatches, read_signed_lines
from tasks.services.llm.chat.completion import ChatCompletion
from tasks.services.llm.config import ProfileConfig
from tests.support.llm import CHAT, GOOD, make_llm
from tests.support.llm_batch import BATCHES, Cut, ask_in_batch, cut_after, make_batching
from tests.support.llm_server import ScriptedServer, completion, scripted_server
from tests.support.xai_server import XaiServer, xai_server

PRICES = {"input": 1.0, "output": 10.0, "batch_discount": 0.5, "date": "2026-11-22"}


def row(custom_id: str, **changes: Any) -> dict[str, Any]:
    whole = {"custom_id": custom_id, "response": {"status_code": 200, "body": completion(GOOD)}, "error": None}
    return {**whole, **changes}


ODD_ROWS: dict[str, Any] = {
    "a list": lambda name: [1, 2],
    "a number": lambda name: 42,
    "null": lambda name: None,
    "a string": lambda name: "row",
    "response is a string": lambda name: row(name, response="fine"),
    "response is a list": lambda name: row(name, response=[200]),
    "body is a string": lambda name: row(name, response={"status_code": 200, "body": GOOD}),
    "body is null": lambda name: row(name, response={"status_code": 200, "body": None}),
    "body is a string and the status 500": lambda name: row(name, response={"status_code": 500, "body": "oops"}),
    "error is a list": lambda name: row(name, error=[1]),
    "error is a string": lambda name: row(name, error="oops", response=None),
    "custom_id is a list": lambda name: {**row(name), "custom_id": [name]},
    "choices are strings": lambda name: row(name, response={"status_code": 200, "body": {"choices": ["a"]}}),
}


class OddBatchApi(InMemoryBatchApi):
    """Writes one odd row among the good ones."""

    def __init__(self, answer: Any, odd: Any) -> None:
        super().__init__(answer)
        self.odd = odd

    def run_row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        odd, self.odd = self.odd, None
        if odd is not None:
            return odd(row["custom_id"]), True
        return super().run_row(row)


@pytest.mark.parametrize("odd", ODD_ROWS.values(), ids=ODD_ROWS.keys())
def test_a_malformed_row_fails_alone_and_is_retried(server: ScriptedServer, tmp_path: Path, odd: Any) -> None:
    server.batch_api = OddBatchApi(server.answer_row, odd)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (3, 1)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"]) == (2, 4)


def test_a_deeply_nested_row_fails_alone(server: ScriptedServer, tmp_path: Path) -> None:
    class Nesting(InMemoryBatchApi):
        def read_file(self, file_id: str) -> bytes:
            data = super().read_file(file_id)
            return (
                b"[" * 100_000 + b"\n" + data.split(b"\n", 1)[1]
                if "output" in self.files[file_id]["filename"]
                else data
            )

    server.batch_api = Nesting(server.answer_row)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (3, 1)


def test_the_rows_of_a_lost_output_file_are_submitted_again(server: ScriptedServer, tmp_path: Path) -> None:
    class Forgetful(InMemoryBatchApi):
        """Answers 404 for the first job's output file."""

        def read_file(self, file_id: str) -> bytes:
            first = next(iter(self.batches.values()))
            if file_id == first["output_file_id"]:
                del self.contents[file_id]
                del self.files[file_id]
            return super().read_file(file_id)

    server.batch_api = Forgetful(server.answer_row)
    budget = {"prices": PRICES}
    llm = make_llm(server, tmp_path, **budget)
    answers, failures = ask_in_batch(llm)
    assert answers == {}
    assert all("output file" in reason for reason in failures.values())
    answers, failures = ask_in_batch(make_llm(server, tmp_path, **budget))
    assert (len(answers), failures) == (4, {})
    assert server.counts[BATCHES] == 2


class OddStatus(InMemoryBatchApi):
    """Describes jobs with a status that nobody knows, or without one."""

    status: Any = None

    def retrieve(self, batch_id: str) -> dict[str, Any]:
        return {**super().retrieve(batch_id), "status": self.status}


@pytest.mark.parametrize("status", [None, "paused", 7, ["completed"], ""])
def test_a_job_of_unknown_status_is_polled_until_its_deadline(
    server: ScriptedServer, tmp_path: Path, status: Any
) -> None:
    server.batch_api = OddStatus(server.answer_row)
    server.batch_api.status = status
    with pytest.raises(StillPending):
        ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.1)
    answers, failures = ask_in_batch(make_llm(server, tmp_path), deadline_seconds=0.05)
    assert (len(answers), failures) == (4, {})
    assert server.counts[BATCHES] == 1


@pytest.mark.parametrize("shown", [None, [], "batch", {"id": 7}, {"request_counts": "many", "errors": {"data": ["x"]}}])
def test_a_malformed_job_object_raises_service_unavailable_and_can_be_resumed(
    server: ScriptedServer, tmp_path: Path, shown: Any
) -> None:
    class Odd(InMemoryBatchApi):
        def retrieve(self, batch_id: str) -> Any:
            return shown

    server.batch_api = Odd(server.answer_row)
    with pytest.raises(ServiceUnavailable):
        ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.1)
    server.batch_api.__class__ = InMemoryBatchApi  # type: ignore[assignment]
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})


@pytest.mark.parametrize("listed", [[None], ["x"], [{"id": 3}], "none"])
def test_malformed_entries_of_the_job_list_are_skipped(server: ScriptedServer, tmp_path: Path, listed: Any) -> None:
    class Odd(InMemoryBatchApi):
        def list_batches(self) -> Any:
            return listed

    server.batch_api = Odd(server.answer_row)
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4


def test_an_input_file_that_expired_before_job_creation_is_uploaded_again(
    server: ScriptedServer, tmp_path: Path
) -> None:
    llm = make_llm(server, tmp_path)
    cut_after(llm, 2)  # uploaded, no job yet
    with pytest.raises(Cut):
        ask_in_batch(llm)
    server.batch_api.contents.clear()
    server.batch_api.files.clear()
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4


LIMIT = "Enqueued token limit reached for asked-model in organization org-x. Limit: 2,000 enqueued tokens."


class LimitedBatchApi(InMemoryBatchApi):
    """Fails jobs of more than so many rows, as OpenAI does beyond its ceiling of enqueued tokens."""

    most = 1

    def run(self, batch: dict[str, Any]) -> None:
        if self.contents[batch["input_file_id"]].count(b"\n") > self.most:
            batch["errors"] = {"object": "list", "data": [{"code": "token_limit_exceeded", "message": LIMIT}]}
            batch["status"] = "failed"
        else:
            super().run(batch)


def test_a_job_beyond_the_enqueued_token_limit_is_split(
    server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.batch_api = LimitedBatchApi(server.answer_row)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})
    assert server.counts["row"] == 4
    assert "llm.profiles.p.batch_tokens" in caplog.text


def test_a_token_limit_below_every_job_raises_an_error_naming_the_setting(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.batch_api = LimitedBatchApi(server.answer_row)
    server.batch_api.most = 0
    with pytest.raises(StillPending, match=r"llm\.profiles\.p\.batch_tokens"):
        ask_in_batch(make_llm(server, tmp_path), max_wait_seconds=0.2)
    assert server.counts["row"] == 0
    server.batch_api.most = 4
    assert len(ask_in_batch(make_llm(server, tmp_path))[0]) == 4


def test_concurrent_runs_with_the_same_requests_create_one_job(server: ScriptedServer, tmp_path: Path) -> None:
    outcomes: list[Any] = []

    def work() -> None:
        outcomes.append(ask_in_batch(make_llm(server, tmp_path)))

    server.batch_api.turn.acquire()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    threading.Timer(1.0, server.batch_api.turn.release).start()
    for thread in threads:
        thread.join()
    assert [(len(answers), failures) for answers, failures in outcomes] == [(4, {})] * 3
    assert (server.counts[BATCHES], server.counts["row"]) == (1, 4)


# ---- xAI


XAI_ROWS: dict[str, Any] = {
    "a list": [1],
    "null": None,
    "a string": "row",
    "a result that is a string": {"batch_request_id": "?", "batch_result": "fine"},
    "a response that is a list": {"batch_request_id": "?", "batch_result": {"response": [1]}},
    "a completion that is a string": {
        "batch_request_id": "?", "batch_result": {"response": {"chat_get_completion": "fine"}},
    },
    "an error that is a list": {"batch_request_id": "?", "error_message": [1]},
}  # fmt: skip


@pytest.fixture
def xai() -> Iterator[XaiServer]:
    with xai_server() as running:
        yield running


@pytest.mark.parametrize("odd", XAI_ROWS.values(), ids=XAI_ROWS.keys())
def test_a_malformed_xai_row_fails_alone_and_is_retried(xai: XaiServer, tmp_path: Path, odd: Any) -> None:
    plain = xai.results

    def results(batch_id: str, token: int) -> dict[str, Any]:
        page = plain(batch_id, token)
        if batch_id == "batch_0" and token == 0:
            name = page["results"][0]["batch_request_id"]
            page["results"][0] = {**odd, "batch_request_id": name} if isinstance(odd, dict) else odd
        return page

    xai.results = results  # type: ignore[method-assign]
    answers, failures = ask_in_batch(make_batching(xai, tmp_path, "xai"))
    assert (len(answers), len(failures)) == (3, 1)
    answers, failures = ask_in_batch(make_batching(xai, tmp_path, "xai"))
    assert (len(answers), failures) == (4, {})
    assert (xai.counts["create"], xai.counts["row"]) == (2, 5)


@pytest.mark.parametrize("state", [None, "ready", [1], {"num_requests": "many"}, {"num_requests": -1}])
def test_malformed_xai_counters_raise_service_unavailable_and_can_be_resumed(
    xai: XaiServer, tmp_path: Path, state: Any
) -> None:
    plain = xai.retrieve
    xai.retrieve = lambda batch_id: {**plain(batch_id), "state": state}  # type: ignore[method-assign]
    with pytest.raises(ServiceUnavailable):
        ask_in_batch(make_batching(xai, tmp_path, "xai"), max_wait_seconds=0.1)
    xai.retrieve = plain  # type: ignore[method-assign]
    answers, failures = ask_in_batch(make_batching(xai, tmp_path, "xai"))
    assert (len(answers), failures, xai.counts["create"]) == (4, {}, 1)


def test_endless_xai_pagination_is_stopped(xai: XaiServer, tmp_path: Path) -> None:
    plain = xai.results
    xai.results = lambda batch_id, token: {**plain(batch_id, token), "pagination_token": "0"}  # type: ignore[method-assign]
    answers, failures = ask_in_batch(make_batching(xai, tmp_path, "xai"))
    assert len(answers) + len(failures) == 4


# ---- jobs on this machine

FLIPPED = """
import json, sys
source, target = sys.argv[1:]
with open(target, "w") as out:
    for number, line in enumerate(open(source)):
        row = json.loads(line)
        message = {"role": "assistant", "content": '{"grade": 2}'}
        body = {"model": "asked-model", "choices": [{"message": message, "finish_reason": "stop"}]}
        told = {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}
        print("[1, 2]" if number == 1 else json.dumps(told), file=out)
"""


def test_a_malformed_row_of_a_batch_command_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text(FLIPPED)
    command = (sys.executable, str(tmp_path / "runner.py"), "{input}", "{output}")
    with scripted_server() as server:
        answers, failures = ask_in_batch(make_batching(server, tmp_path, "file", batch_command=command))
    assert (len(answers), len(failures)) == (3, 1)


@pytest.mark.parametrize("depth", [600, 5_000])
def test_a_deeply_nested_reply_to_the_local_batch_runner_fails_alone(tmp_path: Path, depth: int) -> None:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    profile = ProfileConfig(base_url="http://127.0.0.1:1/v1", model="m")
    replies = iter([ChatCompletion(raw={"z": nested}), ChatCompletion(raw={"z": 1})])
    batches = LocalBatches(profile, tmp_path, lambda body: next(replies))
    staged = tmp_path / "staged.part"
    for custom_id in ("1", "2"):
        batches.answer({"custom_id": custom_id, "body": {}}, staged)
    told = dict(read_signed_lines(staged.read_bytes()))
    assert sorted(told) == ["1", "2"]
    assert (told["1"].completion, told["1"].error) == (None, "the reply nests too deeply")
    assert told["2"].completion is not None


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_result_of_the_local_batch_runner_is_requested_again(tmp_path: Path, damage: str) -> None:
    class Dying(ScriptedServer):
        def next_answer(self) -> Any:
            if self.counts[CHAT] == 4:
                return 401, {}, b"{}"
            return super().next_answer()

    with scripted_server(Dying()) as server:
        server.script(GOOD)
        with pytest.raises(Exception, match="key"):
            ask_in_batch(make_batching(server, tmp_path, "local", concurrency=1))
        [part] = (tmp_path / "batches").glob("*.part")
        data = part.read_bytes()
        assert data.count(b"\n") == 3
        part.write_bytes(data.replace(b'\\"grade\\": 2', b'\\"grade\\": 1', 1) if damage == "flip" else data[:-9])
        answers, failures = ask_in_batch(make_batching(server, tmp_path, "local", concurrency=1))
        assert {answer.reply.grade for answer in answers.values()} == {2}
        assert (len(answers), failures, server.counts[CHAT]) == (4, {}, 6)
