"""Many subjects, one run each: a table of them, a folder, or an inbox in the store that a schedule looks at."""

import logging
from collections.abc import Iterator
from pathlib import Path

from prefect import flow
from prefect.runtime import deployment

from conf.compose import compile_request
from conf.subjects import ManyRequest
from conf.trust import allowed_roots, check_path
from flows.personalize_subject import personalize_subject
from flows.runs.attempts import end_when_cancelled
from flows.subjects.dispatch import Batch, follow_runs, has_pool, submit_subject
from flows.subjects.index_page import name_batch, show_name, write_index
from flows.subjects.listing import Origin, Subject, list_subjects
from flows.subjects.records import (
    FOLDER,
    ManyOutcome,
    SubjectOutcome,
    SubjectRun,
    SubjectStatus,
    next_attempt,
    read_record,
    write_record,
)
from tasks.config_base import RequestRule
from tasks.errors import LikenessError, StillPending, first_line
from tasks.mini.vision_server.launch import keep_server
from tasks.services.store.lease import hold_lease
from tasks.services.store.open import open_store
from tasks.training.process.fork_server import keep_imports

log = logging.getLogger("likeness.subjects")


@flow(name="personalize-many", persist_result=False)
@end_when_cancelled
def personalize_many(request: ManyRequest = ManyRequest()) -> ManyOutcome:  # noqa: B008 - frozen
    """Run every subject that has no finished run of these photos and settings.

    With a work pool, runs are submitted to it, each exactly once, and several run at a time; without one, they run here
    in turn. One that fails does not stop the others.
    """
    roots = None if deployment.id is None else allowed_roots()
    if roots is not None:
        # As untrusted as the settings of a request.
        check_path("subjects", request.subjects, roots, rule=RequestRule("photos"))
    config = compile_request(request.base, roots=roots)
    batch = Batch(request, open_store(config.store), Path(config.output_dir).absolute())
    subjects = list(list_subjects(Origin(request, batch.store, roots)))
    run_all = run_on_pool if has_pool() else run_here
    name = name_batch(request)
    with keep_server(batch.output / "many" / name / "vision-server.log"), keep_imports():
        outcomes = [*list_unready(subjects), *run_all(batch, [each for each in subjects if each.request])]
    order = {subject.name: number for number, subject in enumerate(subjects)}
    outcomes.sort(key=lambda outcome: order[outcome.name])
    folder = write_index(batch.output / "many" / name, outcomes, title=show_name(request.subjects), store=batch.store)
    return ManyOutcome(name=name, outcomes=outcomes, folder=str(folder))


def list_unready(subjects: list[Subject]) -> Iterator[SubjectOutcome]:
    """Yield the outcomes of subjects that can't be run, or not yet."""
    for subject in subjects:
        if subject.request is None:
            status: SubjectStatus = "incomplete" if subject.is_incomplete else "refused"
            log.info("%s: %s (%s)", subject.name, status, subject.problem)
            yield SubjectOutcome(name=subject.name, status=status, reason=subject.problem)


def run_on_pool(batch: Batch, subjects: list[Subject]) -> Iterator[SubjectOutcome]:
    """Submit the runs to the work pool and yield their outcomes."""
    for subject in subjects:
        done = batch.find_done(subject)
        if done is not None:
            yield done
            continue
        try:
            submit_subject(batch, subject)
        except Exception as error:  # the server refuses this request; the others may be right
            log.info("%s: failed (%s)", subject.name, first_line(error))
            yield SubjectOutcome(name=subject.name, status="failed", reason=f"not submitted: {first_line(error)}")
    # In a deployment it would hold the slot of the pool that its runs need.
    yield from follow_runs(batch, is_waiting=batch.request.wait and deployment.id is None)


def run_here(batch: Batch, subjects: list[Subject]) -> Iterator[SubjectOutcome]:
    """Run the subjects in this process, in turn."""
    for number, subject in enumerate(subjects, 1):
        # Another process with the same subject waits, and finds it done.
        lease = hold_lease(
            batch.store,
            f"{FOLDER}/{subject.key}",
            max_wait_seconds=24 * 3600.0,
            poll_seconds=1.0,
            on_wait=lambda who, name=subject.name: log.info("%s: waiting for %s, which runs it", name, who),  # type: ignore[misc]
        )
        with lease:
            done = batch.find_done(subject)
            outcome = done or run_subject(batch, subject)
        reason = f" ({outcome.reason})" if outcome.reason else ""
        log.info("%d/%d %s: %s%s", number, len(subjects), subject.name, outcome.status, reason)
        yield outcome


def run_subject(batch: Batch, subject: Subject) -> SubjectOutcome:
    """Run the main job for a subject and record its outcome."""
    assert subject.request is not None
    attempt = next_attempt(read_record(batch.store, subject.key))
    try:
        summary = personalize_subject(subject.request)
    except StillPending as error:  # `likeness pending`, or the next call, collects its batch job
        return SubjectOutcome(name=subject.name, status="pending", reason=str(error))
    except Exception as error:  # whatever one subject's run raises must not stop the others
        kind = error.kind if isinstance(error, LikenessError) else type(error).__name__
        failed = SubjectRun(status="failed", attempt=attempt, reason=f"{kind}: {first_line(error)}"[:500])
        write_record(batch.store, subject.key, failed)
        return SubjectOutcome(name=subject.name, status="failed", reason=failed.reason)
    write_record(batch.store, subject.key, SubjectRun(status="finished", attempt=attempt, run_id=summary.run_id))
    return SubjectOutcome(name=subject.name, status="finished", run_id=summary.run_id, summary=summary)
