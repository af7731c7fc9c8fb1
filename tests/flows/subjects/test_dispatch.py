"""Submitted runs of many subjects: what counts as their end, and what is remembered."""

import datetime
import uuid
from pathlib import Path

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from conf.request import RunRequest
from conf.subjects import ManyRequest
from flows.runs.records import read_summary, write_end, write_request, write_start, write_summary
from flows.subjects.dispatch import CRASH_SECONDS, Batch, collect, forget, is_over
from flows.subjects.listing import Subject
from flows.subjects.records import SubjectRun, read_record, write_record
from tasks.errors import TrainingFailed
from tasks.services.store.local import LocalStore

SUBJECT = Subject("rex", RunRequest(), key="k")


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(ManyRequest(), LocalStore(tmp_path / "store"), tmp_path / "runs")


def make_run(state: object) -> FlowRun:
    return FlowRun.model_validate({"id": uuid.uuid4(), "flow_id": uuid.uuid4(), "state": state})


def test_a_crashed_run_has_ended_only_when_nothing_reschedules_it() -> None:
    ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=CRASH_SECONDS + 1)
    assert not is_over(make_run(Crashed()))
    assert is_over(make_run(Crashed(timestamp=ago)))
    assert not is_over(make_run(Running(timestamp=ago)))
    assert all(is_over(make_run(state)) for state in (Completed(), Failed(), Cancelled()))


def test_a_flow_run_that_the_server_forgot_fails_its_subject_which_runs_again(batch: Batch) -> None:
    run_id = uuid.uuid4()
    write_record(batch.store, "k", SubjectRun(status="submitted", attempt=3, flow_run_id=str(run_id)))
    outcome = forget(batch, SUBJECT, run_id)
    assert outcome.status == "failed"
    assert "no longer knows" in outcome.reason
    record = read_record(batch.store, "k")
    assert record is not None
    assert (record.status, record.attempt) == ("failed", 3)
    assert batch.find_done(SUBJECT) is None


def test_the_outcome_of_a_run_is_found_by_its_flow_run(batch: Batch) -> None:
    done, failed = make_run(Completed()), make_run(Failed(message="from Prefect"))
    for name, run in (("20260101-000000-fish-0001", done), ("20260101-000000-fish-0002", failed)):
        folder = batch.output / name
        folder.mkdir(parents=True)
        write_request(folder, RunRequest(), is_trusted=False)
        write_start(folder, name, flow_run_id=str(run.id))
    finished = batch.output / "20260101-000000-fish-0001"
    write_summary(finished, read_summary(finished).model_copy(update={"status": "finished"}))
    write_end(batch.output / "20260101-000000-fish-0002", "20260101-000000-fish-0002", TrainingFailed("out of memory"))
    assert collect(batch, SUBJECT, done).run_id == "20260101-000000-fish-0001"
    unchanged = batch.find_done(SUBJECT)
    assert unchanged is not None
    assert (unchanged.status, unchanged.run_id) == ("unchanged", "20260101-000000-fish-0001")
    assert collect(batch, SUBJECT, failed).reason == "out of memory"
    assert batch.find_done(SUBJECT) is None  # retried
    batch.request = ManyRequest(retry_failed=False)
    kept = batch.find_done(SUBJECT)
    assert kept is not None
    assert (kept.status, kept.reason) == ("failed", "out of memory")
