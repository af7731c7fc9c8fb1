"""Batch jobs that survive being cut off anywhere."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.mini.vision_server.batch_api import InMemoryBatchApi
from tasks.services.llm.chat.body import count_body_tokens
from tasks.services.llm.chat.request import RequestSpec
from tests.support.llm import CHAT, GOOD, Reply, make_llm
from tests.support.llm_batch import BATCHES, FILES, SPECS, Cut, ask_in_batch, cut_after
from tests.support.llm_server import ExpiringBatchApi, ScriptedServer, completion


def test_all_rows_are_completed_in_one_job(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path)
    answers, failures = ask_in_batch(llm)
    assert {name: answer.reply.grade for name, answer in answers.items()} == dict.fromkeys(SPECS, 2)
    assert failures == {}
    assert (server.counts[FILES], server.counts[BATCHES], server.counts["row"]) == (1, 1, 4)
    assert all(row.is_batch for row in llm.ledger.rows)


def test_a_second_run_creates_no_job(server: ScriptedServer, tmp_path: Path) -> None:
    ask_in_batch(make_llm(server, tmp_path))
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4
    assert (server.counts[BATCHES], server.counts["row"]) == (1, 4)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_run_interrupted_at_any_saved_state_pays_for_one_job(
    server: ScriptedServer, tmp_path: Path, number: int
) -> None:
    llm = make_llm(server, tmp_path)
    cut_after(llm, number)
    with pytest.raises(Cut):
        ask_in_batch(llm)
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4
    assert (server.counts[BATCHES], server.counts["row"]) == (1, 4)


def test_a_job_created_but_never_recorded_is_adopted(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path)
    create = llm.client("p").batches.create

    def create_and_die(**options: Any) -> None:
        create(**options)
        raise Cut

    llm.client("p").batches.create = create_and_die
    with pytest.raises(Cut):
        ask_in_batch(llm)
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4
    assert (server.counts[BATCHES], server.counts["row"]) == (1, 4)


def test_only_failed_rows_are_retried(server: ScriptedServer, tmp_path: Path) -> None:
    server.script(GOOD, (500, {}, b"{}"), GOOD, '{"grade": 7}', GOOD)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (2, 2)
    assert any("scripted failure" in reason for reason in failures.values())
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (4, 0)
    assert (server.counts[BATCHES], server.counts["row"]) == (2, 6)


def test_a_job_with_only_failed_rows_is_reported_and_not_adopted_again(server: ScriptedServer, tmp_path: Path) -> None:
    server.script((500, {}, b"{}"))
    _, failures = ask_in_batch(make_llm(server, tmp_path))
    assert len(failures) == 4
    server.script(GOOD)
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4


def test_an_interrupted_result_collection_retries_only_the_failed_row(server: ScriptedServer, tmp_path: Path) -> None:
    server.script(GOOD, (500, {}, b"{}"), GOOD)
    llm = make_llm(server, tmp_path)
    cut_after(llm, 6)
    with pytest.raises(Cut):
        ask_in_batch(llm)
    assert len(ask_in_batch(make_llm(server, tmp_path))[1]) == 1
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (4, 0)
    assert (server.counts[BATCHES], server.counts["row"]) == (2, 5)


def test_replies_of_an_expired_job_are_cached_and_only_the_rest_is_retried(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.batch_api = ExpiringBatchApi(server.answer_row, num_done=3)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (3, 1)
    assert "before the batch expired" in next(iter(failures.values()))
    server.batch_api = ExpiringBatchApi(server.answer_row, num_done=9)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"]) == (2, 4)


def test_rows_with_foreign_custom_ids_are_ignored(server: ScriptedServer, tmp_path: Path) -> None:
    names = iter(["", "somebody-elses", "nobodys", ""])

    class Confused(InMemoryBatchApi):
        """Gives two rows the names of others."""

        def run_row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
            line, is_good = super().run_row(row)
            return {**line, "custom_id": next(names) or row["custom_id"]}, is_good

    server.batch_api = Confused(server.answer_row)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (2, 2)
    assert all("batch job ended as completed without this row" in reason for reason in failures.values())
    server.batch_api = InMemoryBatchApi(server.answer_row)
    assert len(ask_in_batch(make_llm(server, tmp_path))[0]) == 4


def test_a_job_past_its_deadline_is_cancelled_and_finished_synchronously(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.batch_api.turn.acquire()  # the provider is busy with others
    threading.Timer(5.0, server.batch_api.turn.release).start()
    llm = make_llm(server, tmp_path)
    answers, failures = ask_in_batch(llm, deadline_seconds=0.1)
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"], server.counts[CHAT]) == (1, 0, 4)
    assert sum(path.endswith("/cancel") for path in server.counts) == 1
    assert [row.is_batch for row in llm.ledger.rows] == [False] * 4


def test_a_recorded_but_unsent_cancellation_is_sent_by_the_next_run(server: ScriptedServer, tmp_path: Path) -> None:
    def cut(job_id: str) -> None:
        raise Cut

    server.batch_api.turn.acquire()
    llm = make_llm(server, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.services.llm.batch.openai_api.OpenAiBatches.cancel", lambda self, job_id: cut(job_id))
        with pytest.raises(Cut):
            ask_in_batch(llm, deadline_seconds=0.1)
    threading.Timer(0.5, server.batch_api.turn.release).start()
    answers, failures = ask_in_batch(make_llm(server, tmp_path), deadline_seconds=0.1)
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"], server.counts[CHAT]) == (1, 0, 4)


def test_a_job_that_completes_before_its_cancellation_is_still_collected(
    server: ScriptedServer, tmp_path: Path
) -> None:
    def refuse(self: object, job_id: str) -> None:
        if not released:
            released.append(True)
            server.batch_api.turn.release()
        raise ConfigError("it has ended")

    released: list[bool] = []

    server.batch_api.turn.acquire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.services.llm.batch.openai_api.OpenAiBatches.cancel", refuse)
        llm = make_llm(server, tmp_path)
        answers, failures = ask_in_batch(llm, deadline_seconds=0.05)
    assert (len(answers), failures, server.counts["row"], server.counts[CHAT]) == (4, {}, 4, 0)


def test_jobs_are_split_at_the_batch_token_limit(server: ScriptedServer, tmp_path: Path) -> None:
    many = {f"s{n}": RequestSpec("grade", (f"sample {n}", "x" * 1200), Reply) for n in range(6)}
    llm = make_llm(server, tmp_path, batch_tokens=1500)
    body = many["s0"].body(llm.profile("judge"), "json_schema")
    assert 500 < count_body_tokens(body, llm.profile("judge"))[0] < 750  # two fit, three don't
    answers, _ = ask_in_batch(llm, specs=many)
    assert len(answers) == 6
    assert server.counts[BATCHES] == 3


def test_unicode_line_separators_in_a_reply_do_not_split_its_row(server: ScriptedServer, tmp_path: Path) -> None:
    content = '{"grade": 2, "note": "a\u2028b"}'
    server.script((200, {}, json.dumps(completion(content), ensure_ascii=False).encode()))
    assert len(ask_in_batch(make_llm(server, tmp_path))[0]) == 4


def test_a_job_unknown_to_the_provider_is_created_again(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path)
    cut_after(llm, 3)
    with pytest.raises(Cut):
        ask_in_batch(llm)
    server.batch_api.batches.clear()
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4


def test_a_job_past_max_wait_seconds_is_resumed_by_the_next_run(server: ScriptedServer, tmp_path: Path) -> None:
    server.batch_api.turn.acquire()
    llm = make_llm(server, tmp_path)
    with pytest.raises(ServiceUnavailable, match="still validating; `likeness pending` resumes the run"):
        ask_in_batch(llm, max_wait_seconds=0.1)
    server.batch_api.turn.release()
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4
    assert server.counts[BATCHES] == 1
