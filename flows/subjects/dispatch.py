"""Runs of many subjects on a work pool: each is submitted once, and followed to its end."""

import datetime
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conf.subjects import ManyRequest
from flows.runs.records import list_summaries
from flows.subjects.listing import Subject
from flows.subjects.records import SubjectOutcome, SubjectRun, next_attempt, read_record, write_record
from flows.subjects.waiting import explain_wait
from tasks.manifests.run_summary import RunSummary
from tasks.redaction import clean_text
from tasks.services.store.base import Store

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger("likeness.subjects")
DEPLOYMENT = "personalize-subject/personalize-subject"
BULK_QUEUE = "bulk"
"""A queue behind the default one: hundreds of subjects don't keep a person's single run waiting."""
POLL_SECONDS = 2.0
PAGE = 100
# An automation schedules crashed runs again; without it they stay crashed.
CRASH_SECONDS = 120.0


@dataclass
class Batch:
    """The subjects of one request, and where their results go."""

    request: ManyRequest
    store: Store
    output: Path
    followed: dict[uuid.UUID, Subject] = field(default_factory=dict)
    """Subjects by the flow run that was submitted for them."""

    def find_done(self, subject: Subject) -> SubjectOutcome | None:
        """Return the outcome of a subject that is not run again."""
        record = read_record(self.store, subject.key)
        if record is None or record.status == "submitted":
            return None
        if record.status == "finished":
            summary = find_summary(self.output, run_id=record.run_id)
            return SubjectOutcome(name=subject.name, status="unchanged", run_id=record.run_id, summary=summary)
        if self.request.retry_failed:
            return None
        return SubjectOutcome(name=subject.name, status=record.status, run_id=record.run_id, reason=record.reason)


def has_pool() -> bool:
    """Whether a work pool can run the main job: its deployment is registered, and a worker is online."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
    from prefect.client.schemas.objects import WorkerStatus
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            pool = client.read_deployment_by_name(DEPLOYMENT).work_pool_name
        except ObjectNotFound:
            return False
        online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE]))
        if pool and client.read_workers_for_work_pool(pool, worker_filter=online, limit=1):
            return True
    log.info("no worker of the pool %s is online: the subjects run here, in turn", pool)
    return False


def submit_subject(batch: Batch, subject: Subject) -> None:
    """Submit a subject's run, unless it was submitted before.

    The idempotency key makes it one flow run even where two processes submit it at once, or one dies before it has
    written its record.
    """
    from prefect.client.schemas.objects import FlowRun
    from prefect.deployments import run_deployment

    from flows.runs.artifacts import NAMED

    assert subject.request is not None
    record = read_record(batch.store, subject.key)
    if record is not None and record.status == "submitted" and record.flow_run_id:
        batch.followed[uuid.UUID(record.flow_run_id)] = subject
        return
    attempt = next_attempt(record)
    run = run_deployment(
        DEPLOYMENT,
        parameters={"request": subject.request.model_dump(mode="json", exclude_unset=True)},
        timeout=0,
        # A run with a parent can't be suspended, as it is while a person approves its photos.
        as_subflow=False,
        tags=["likeness", NAMED],
        idempotency_key=f"{subject.key}-{attempt}",
        work_queue_name=BULK_QUEUE,
        flow_run_name=f"{clean_text(subject.name)[:80]}-{subject.key[:6]}",
    )
    assert isinstance(run, FlowRun)  # a coroutine only within an event loop
    batch.followed[run.id] = subject
    submitted = SubjectRun(status="submitted", attempt=attempt, flow_run_id=str(run.id))
    write_record(batch.store, subject.key, submitted)
    log.info("%s: submitted as %s", subject.name, run.name)


def follow_runs(batch: Batch, *, is_waiting: bool) -> Iterator[SubjectOutcome]:
    """Yield the outcomes of submitted runs as they end; those that still run where nobody waits for them."""
    from prefect.client.orchestration import get_client

    reason = ""
    with get_client(sync_client=True) as client:
        while batch.followed:
            runs = {run.id: run for run in read_runs(client, list(batch.followed))}
            for run_id in [each for each in batch.followed if each not in runs]:
                yield forget(batch, batch.followed.pop(run_id), run_id)
            for run in runs.values():
                if is_over(run):
                    yield collect(batch, batch.followed.pop(run.id), run)
            if not is_waiting:
                yield from (SubjectOutcome(name=each.name, status="submitted") for each in batch.followed.values())
                return
            reason = log_wait(client, [runs[each] for each in batch.followed], reason)
            time.sleep(POLL_SECONDS)


def log_wait(client: "SyncPrefectClient", runs: list["FlowRun"], last_reason: str) -> str:
    """Log what runs wait for, where it changed; return it."""
    paused = [run.name for run in runs if run.state and run.state.is_paused()]
    waiting = [run for run in runs if run.state and run.state.is_scheduled()]
    reason = ""
    if paused:
        reason = f"{', '.join(paused[:3])} waits for approval, in Prefect's UI or by `likeness approve`"
    elif waiting and len(waiting) == len(runs):  # none is at work
        reason = explain_wait(client, waiting[0])
    if reason and reason != last_reason:
        log.info("waiting: %s", reason)
    return reason


def read_runs(client: "SyncPrefectClient", ids: list[uuid.UUID]) -> Iterator["FlowRun"]:
    """Yield those flow runs that the server knows."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    for start in range(0, len(ids), PAGE):
        page = ids[start : start + PAGE]
        yield from client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=page)), limit=PAGE)


def is_over(run: "FlowRun") -> bool:
    """Whether a flow run has ended for good: a crashed one is about to be scheduled again."""
    if run.state is None or not run.state.is_final():
        return False
    age = datetime.datetime.now(datetime.UTC) - run.state.timestamp
    return not run.state.is_crashed() or age.total_seconds() > CRASH_SECONDS


def forget(batch: Batch, subject: Subject, run_id: uuid.UUID) -> SubjectOutcome:
    """Record that a flow run was deleted, or belongs to another server's database."""
    reason = "the server no longer knows its flow run"
    record = read_record(batch.store, subject.key)
    attempt = record.attempt if record else 1
    failed = SubjectRun(status="failed", attempt=attempt, flow_run_id=str(run_id), reason=reason)
    write_record(batch.store, subject.key, failed)
    log.info("%s: failed (%s)", subject.name, reason)
    return SubjectOutcome(name=subject.name, status="failed", reason=reason)


def collect(batch: Batch, subject: Subject, run: "FlowRun") -> SubjectOutcome:
    """Record how a subject's flow run ended, and return its outcome."""
    state = run.state
    assert state is not None
    summary = find_summary(batch.output, flow_run_id=str(run.id))
    run_id = summary.run_id if summary else ""
    earlier = read_record(batch.store, subject.key)
    attempt = earlier.attempt if earlier else 1
    if state.is_completed():
        record = SubjectRun(status="finished", attempt=attempt, flow_run_id=str(run.id), run_id=run_id)
        outcome = SubjectOutcome(name=subject.name, status="finished", run_id=run_id, summary=summary)
    else:
        reason = summary.error.message if summary and summary.error else clean_text(state.message or state.name or "")
        status: Literal["cancelled", "failed"] = "cancelled" if state.is_cancelled() else "failed"
        record = SubjectRun(status=status, attempt=attempt, flow_run_id=str(run.id), run_id=run_id, reason=reason[:500])
        outcome = SubjectOutcome(name=subject.name, status=status, run_id=run_id, reason=record.reason)
    write_record(batch.store, subject.key, record)
    log.info("%s: %s%s", subject.name, outcome.status, f" ({outcome.reason})" if outcome.reason else "")
    return outcome


def find_summary(output: Path, *, run_id: str = "", flow_run_id: str = "") -> RunSummary | None:
    """Return a run's summary by its name or by its newest flow run; None where the folder is elsewhere or gone."""
    for summary in list_summaries(output):
        if (run_id and summary.run_id == run_id) or (flow_run_id and summary.flow_run_id == flow_run_id):
            return summary
    return None
