"""Batch jobs that survive being cut off anywhere."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.mini.vision_server.batch_api import InMemoryBatchApi
from tasks.services.llm.chat.request import RequestSpec, count_body_tokens
from tests.support.llm import CHAT, GOOD, Reply, make_llm
from tests.support.llm_batch import BATCHES, FILES, SPECS, Cut, ask_in_batch, cut_after
from tests.support.llm_server import ExpiringDesk, ScriptedServer, completion


def test_all_rows_are_answered_in_one_job(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path)
    answers, failures = ask_in_batch(llm)
    assert {name: answer.reply.grade for name, answer in answers.items()} == dict.fromkeys(SPECS, 2)
    assert failures == {}
    assert (server.counts[FILES], server.counts[BATCHES], server.counts["row"]) == (1, 1, 4)
    assert all(row.is_batch for row in llm.ledger.rows)


def test_a_second_run_makes_no_job(server: ScriptedServer, tmp_path: Path) -> None:
    ask_in_batch(make_llm(server, tmp_path))
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4
    assert (server.counts[BATCHES], server.counts["row"]) == (1, 4)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_run_cut_off_at_any_saved_step_pays_for_one_job(server: ScriptedServer, tmp_path: Path, number: int) -> None:
    llm = make_llm(server, tmp_path)
    cut_after(llm, number)
    with pytest.raises(Cut):
        ask_in_batch(llm)
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4
    assert (server.counts[BATCHES], server.counts["row"]) == (1, 4)


def test_a_job_created_but_never_noted_is_adopted(server: ScriptedServer, tmp_path: Path) -> None:
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


def test_only_the_rows_that_failed_are_asked_again(server: ScriptedServer, tmp_path: Path) -> None:
    server.script(GOOD, (500, {}, b"{}"), GOOD, '{"grade": 7}', GOOD)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (2, 2)
    assert any("scripted failure" in reason for reason in failures.values())
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (4, 0)
    assert (server.counts[BATCHES], server.counts["row"]) == (2, 6)


def test_a_job_that_failed_whole_is_said_so_and_not_adopted_again(server: ScriptedServer, tmp_path: Path) -> None:
    server.script((500, {}, b"{}"))
    _, failures = ask_in_batch(make_llm(server, tmp_path))
    assert len(failures) == 4
    server.script(GOOD)
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4


def test_a_harvest_cut_off_after_a_failed_row_asks_only_that_row_again(server: ScriptedServer, tmp_path: Path) -> None:
    server.script(GOOD, (500, {}, b"{}"), GOOD)
    llm = make_llm(server, tmp_path)
    cut_after(llm, 6)
    with pytest.raises(Cut):
        ask_in_batch(llm)
    assert len(ask_in_batch(make_llm(server, tmp_path))[1]) == 1
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (4, 0)
    assert (server.counts[BATCHES], server.counts["row"]) == (2, 5)


def test_what_an_expired_job_answered_is_kept_and_only_the_rest_is_asked_again(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.desk = ExpiringDesk(server.answer_row, num_done=3)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (3, 1)
    assert "before the batch expired" in next(iter(failures.values()))
    server.desk = ExpiringDesk(server.answer_row, num_done=9)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"]) == (2, 4)


def test_rows_under_other_names_are_no_answers(server: ScriptedServer, tmp_path: Path) -> None:
    names = iter(["", "somebody-elses", "nobodys", ""])

    class Confused(InMemoryBatchApi):
        """Gives two rows the names of others."""

        def run_row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
            line, is_good = super().run_row(row)
            return {**line, "custom_id": next(names) or row["custom_id"]}, is_good

    server.desk = Confused(server.answer_row)
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), len(failures)) == (2, 2)
    assert all("batch job ended as completed without this row" in reason for reason in failures.values())
    server.desk = InMemoryBatchApi(server.answer_row)
    assert len(ask_in_batch(make_llm(server, tmp_path))[0]) == 4


def test_a_late_job_is_cancelled_and_what_it_lacks_is_asked_by_calls(server: ScriptedServer, tmp_path: Path) -> None:
    server.desk.turn.acquire()  # the provider is busy with others
    threading.Timer(0.5, server.desk.turn.release).start()
    llm = make_llm(server, tmp_path)
    answers, failures = ask_in_batch(llm, deadline_seconds=0.1)
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"], server.counts[CHAT]) == (1, 0, 4)
    assert sum(path.endswith("/cancel") for path in server.counts) == 1
    assert [row.is_batch for row in llm.ledger.rows] == [False] * 4


def test_a_cancellation_that_was_noted_and_never_sent_is_sent_by_the_next_run(
    server: ScriptedServer, tmp_path: Path
) -> None:
    def cut(job_id: str) -> None:
        raise Cut

    server.desk.turn.acquire()
    llm = make_llm(server, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.services.llm.batch.openai_api.OpenAiBatches.cancel", lambda self, job_id: cut(job_id))
        with pytest.raises(Cut):
            ask_in_batch(llm, deadline_seconds=0.1)
    threading.Timer(0.5, server.desk.turn.release).start()
    answers, failures = ask_in_batch(make_llm(server, tmp_path), deadline_seconds=0.1)
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"], server.counts[CHAT]) == (1, 0, 4)


def test_a_job_that_ends_before_its_cancellation_is_read_all_the_same(server: ScriptedServer, tmp_path: Path) -> None:
    def refuse(self: object, job_id: str) -> None:
        if not released:
            released.append(True)
            server.desk.turn.release()
        raise ConfigError("it has ended")

    released: list[bool] = []

    server.desk.turn.acquire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.services.llm.batch.openai_api.OpenAiBatches.cancel", refuse)
        llm = make_llm(server, tmp_path)
        answers, failures = ask_in_batch(llm, deadline_seconds=0.05)
    assert (len(answers), failures, server.counts["row"], server.counts[CHAT]) == (4, {}, 4, 0)


def test_jobs_are_no_larger_than_the_provider_takes(server: ScriptedServer, tmp_path: Path) -> None:
    many = {f"s{n}": RequestSpec("grade", (f"sample {n}", "x" * 1200), Reply) for n in range(6)}
    llm = make_llm(server, tmp_path, batch_tokens=1500)
    body = many["s0"].body(llm.profile("judge"), "json_schema")
    assert 500 < count_body_tokens(body, llm.profile("judge"))[0] < 750  # two fit, three don't
    answers, _ = ask_in_batch(llm, specs=many)
    assert len(answers) == 6
    assert server.counts[BATCHES] == 3


def test_line_separators_inside_a_reply_are_text(server: ScriptedServer, tmp_path: Path) -> None:
    content = '{"grade": 2, "note": "a\u2028b"}'
    server.script((200, {}, json.dumps(completion(content), ensure_ascii=False).encode()))
    assert len(ask_in_batch(make_llm(server, tmp_path))[0]) == 4


def test_a_job_that_the_provider_forgot_is_made_anew(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path)
    cut_after(llm, 3)
    with pytest.raises(Cut):
        ask_in_batch(llm)
    server.desk.batches.clear()
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4


def test_waiting_too_long_leaves_the_job_for_the_next_run(server: ScriptedServer, tmp_path: Path) -> None:
    server.desk.turn.acquire()
    llm = make_llm(server, tmp_path)
    with pytest.raises(ServiceUnavailable, match="still validating; `likeness pending` resumes the run"):
        ask_in_batch(llm, max_wait_seconds=0.1)
    server.desk.turn.release()
    answers, _ = ask_in_batch(make_llm(server, tmp_path))
    assert len(answers) == 4
    assert server.counts[BATCHES] == 1
