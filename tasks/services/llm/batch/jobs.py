"""Resumable batch jobs: planned by content, persisted before each step, run under a lease, collected.

A job is one JSONL file. Its state is in the store, so a run killed at any point resumes with the same remote job
instead of paying for another; a lease keeps two processes from submitting it twice.
"""

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pydantic import BaseModel

from tasks.errors import ConfigError, ServiceUnavailable, StillPending
from tasks.services.llm.batch.job import BatchJob, BatchState, list_states
from tasks.services.llm.batch.provider import ENDPOINT
from tasks.services.llm.chat.body import count_body_tokens
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import LlmConfig, ProfileConfig
from tasks.services.llm.executor import Answers, AskOptions, Specs, ask_each
from tasks.services.llm.service import LlmService
from tasks.services.store.lease import hold_lease

log = logging.getLogger(__name__)
MAX_ROWS, MAX_BYTES = 50_000, 190_000_000  # OpenAI's limits per file: 50,000 rows and 200 MB, with a margin
MAX_BACKOFF_SECONDS = 300.0


@dataclass(frozen=True)
class BatchOptions:
    """Where the state of jobs is stored, and how long a run waits for them."""

    state_prefix: str
    """Key prefix in the store."""
    poll_seconds: float
    max_wait_seconds: float
    """Longest wait in this process for one job."""
    deadline_seconds: float | None = None
    """Age at which an unfinished job is cancelled and its remaining rows are sent as calls."""
    is_enabled: bool = True
    """Whether requests go by job; otherwise by calls, once the jobs that an earlier run has left have ended."""


@dataclass
class BatchOutcome:
    """Reasons for rows without a reply, by custom id."""

    failures: dict[str, str] = field(default_factory=dict)
    remaining: dict[str, str] = field(default_factory=dict)
    """Rows of cancelled jobs, to be sent as calls."""


def can_batch(config: LlmConfig, role: str) -> bool:
    """Whether a role's first profile has a batch API."""
    return config.profile(role).capabilities.batch != "none"


def ask_many(
    llm: LlmService, specs: Specs, options: AskOptions, *, batch: BatchOptions
) -> tuple[Answers, dict[str, str]]:
    """Answer many requests: by batch jobs where these are enabled and the role's profile has them, else by calls.

    Replies are cached alike, so neither asks what the other has answered.

    Args:
        llm: the service.
        specs: requests by the caller's names.
        options: role and progress of the requests.
        batch: where batch jobs are stored and how long they may take.

    Returns:
        Validated replies, and reasons for the rest, both by name.

    """
    if can_batch(llm.config, options.role):
        if batch.is_enabled:
            return ask_batch(llm, specs, batch, options=options)
        end_jobs(llm, specs, batch, role=options.role)
    return ask_each(llm, specs, options)


def end_jobs(llm: LlmService, specs: Specs, batch: BatchOptions, *, role: str) -> None:
    """Cancel the unfinished jobs of requests that are to be sent as calls, and cache what they have answered.

    None is submitted: one that was only planned is given up.

    Raises:
        StillPending: a job has not ended `max_wait_seconds` after its cancellation.
        ServiceUnavailable: the provider's batch API can't be reached.

    """
    profile = llm.config.fallback_chain(role)[0]
    rows = {spec.compute_key(llm.config.profiles[profile]): spec for spec in specs.values()}
    states = list_states(llm.store, batch.state_prefix)
    jobs = find_unfinished(llm, rows, states, profile=profile, state_prefix=batch.state_prefix)
    try:
        run_jobs(llm, jobs, rows, options=replace(batch, deadline_seconds=None), on_progress=lambda done: None)
    except StillPending:
        raise
    except (ConfigError, ServiceUnavailable) as error:
        raise ServiceUnavailable(
            f"a batch job of an earlier run can't be ended: {error}; `likeness jobs discard` gives it up, and its rows "
            "are then asked by calls"
        ) from error


def ask_batch(
    llm: LlmService, specs: Specs, batch: BatchOptions, *, options: AskOptions
) -> tuple[Answers, dict[str, str]]:
    """Answer many requests through the batch API of a role's first profile; see `ask_many`."""
    role = options.role
    profile = llm.config.fallback_chain(role)[0]
    # Equal requests under several names share one row: providers reject a file that repeats a custom id.
    names: dict[str, list[str]] = {}
    for name, spec in specs.items():
        names.setdefault(spec.compute_key(llm.config.profiles[profile]), []).append(name)
    # Cached rows stay in: a stored job is resumed only where all of its rows are requested again.
    rows = {custom_id: specs[named[0]] for custom_id, named in names.items()}
    answers: Answers = {}
    for name, spec in specs.items():
        cached = llm.find_cached(spec, name=profile, role=role)
        if cached is not None:
            answers[name] = cached
    jobs = plan_jobs(llm, rows, profile=profile, role=role, state_prefix=batch.state_prefix)
    outcome = run_jobs(llm, jobs, rows, options=batch, on_progress=lambda done: options.on_progress(done, len(specs)))
    failures = {name: reason for custom_id, reason in outcome.failures.items() for name in names[custom_id]}
    left = {name: specs[name] for custom_id in outcome.remaining for name in names[custom_id]}
    asked, failed = ask_each(llm, left, AskOptions(role))
    # `run_jobs` leaves its replies in the cache.
    for name, spec in specs.items():
        if name not in {**failures, **failed, **answers, **asked}:
            kept = llm.read_cached(spec, name=profile)
            if kept is None:
                failures[name] = "no reply is cached for this row; run again to retry them"
            else:
                answers[name] = kept
    options.on_progress(len(specs), len(specs))
    return {**answers, **asked}, {**failures, **failed}


def run_jobs(
    llm: LlmService,
    jobs: list[BatchJob],
    rows: Mapping[str, RequestSpec[BaseModel]],
    *,
    options: BatchOptions,
    on_progress: Callable[[int], None],
) -> BatchOutcome:
    """Run jobs one after the other; a job over the provider's limit on enqueued tokens is split.

    Raises:
        StillPending: a job, or the wait for room in the provider's queue, exceeds `max_wait_seconds`.

    """
    outcome, done = BatchOutcome(), 0
    queue = deque(jobs)
    started = time.monotonic()
    num_waits = 0
    while queue:
        job = queue.popleft()
        with hold_lease(
            llm.store,
            job.state.lease_name,
            max_wait_seconds=options.max_wait_seconds,
            poll_seconds=options.poll_seconds,
            on_wait=note_wait(lambda: on_progress(done)),  # noqa: B023
        ):
            # Planned without the lease, so the stored state may be newer than the planned one.
            job.reload()
            if job.state.is_collected:  # by the previous holder of the lease
                done += len(job.lines)
                continue
            if not options.is_enabled and not job.end_early():
                continue
            job.wait(
                poll_seconds=options.poll_seconds,
                max_wait_seconds=options.max_wait_seconds,
                deadline_seconds=options.deadline_seconds,
                on_progress=lambda num, base=done: on_progress(base + num),  # type: ignore[misc]
            )
            reasons = job.keep(rows, role=job.state.role)
        if options.is_enabled and job.job.is_over_limit and reasons:
            # Halves are tried at once; a single row can only wait until the queue drains.
            pause = min(MAX_BACKOFF_SECONDS, options.poll_seconds * 2**num_waits) if len(job.lines) == 1 else 0.0
            if time.monotonic() + pause - started > options.max_wait_seconds:
                raise StillPending(
                    f"the provider's queue has no room for the batch job: {job.job.error}; `likeness pending` resumes "
                    f"the run, or set llm.profiles.{job.name}.batch_tokens below the limit"
                )
            time.sleep(pause)
            num_waits += bool(pause)
            # At the front and in order: the halves run before the remaining jobs.
            queue.extendleft(reversed(split_job(llm, job, options)))
            continue
        done += len(job.lines)
        for custom_id, reason in reasons.items():
            (outcome.remaining if custom_id in job.unanswered else outcome.failures)[custom_id] = reason
    return outcome


def note_wait(then: Callable[[], None]) -> Callable[[str], None]:
    """Return what is called while another process holds a job: it warns at the first call, and calls `then` at each."""
    noted: list[str] = []

    def note(who: str) -> None:
        if not noted:
            log.warning("waiting for %s, which runs a batch job of the same requests", who)
        noted.append(who)
        then()

    return note


def split_job(llm: LlmService, job: BatchJob, options: BatchOptions) -> list[BatchJob]:
    """Return the jobs that replace one over the limit on enqueued tokens: its halves, or its single row again."""
    custom_ids = list(job.lines)
    middle = len(custom_ids) // 2
    if middle:
        log.warning(
            "batch job %s is over the provider's limit on enqueued tokens and split in two (%s); set %s below it",
            job.job.job_id, job.job.error, f"llm.profiles.{job.name}.batch_tokens",
        )  # fmt: skip
    parts = [custom_ids[:middle], custom_ids[middle:]] if middle else [custom_ids]
    states = list_states(llm.store, options.state_prefix)
    return [
        new_job(llm, {name: job.lines[name] for name in part}, states, like=job.state, prefix=options.state_prefix)
        for part in parts
    ]


def new_job(
    llm: LlmService, lines: dict[str, bytes], states: list[BatchState], *, like: BatchState, prefix: str
) -> BatchJob:
    """Return a planned job; its attempt is the number of stored jobs of the same input."""
    # A new attempt has a new idempotency key, so the provider's earlier job of this input is not found instead.
    sha256 = hashlib.sha256(b"".join(lines.values())).hexdigest()
    attempt = sum(state.input_sha256 == sha256 for state in states)
    state = BatchState(
        input_sha256=sha256, attempt=attempt, custom_ids=tuple(lines), profile=like.profile, role=like.role
    )
    return BatchJob(llm, lines, state, state_prefix=prefix)


def plan_jobs(
    llm: LlmService, rows: Mapping[str, RequestSpec[BaseModel]], *, profile: str, role: str, state_prefix: str
) -> list[BatchJob]:
    """Return the unfinished jobs of earlier runs, then new jobs for the rows in none of them."""
    states = list_states(llm.store, state_prefix)
    jobs = find_unfinished(llm, rows, states, profile=profile, state_prefix=state_prefix)
    covered = {custom_id for job in jobs for custom_id in job.lines}
    missing = {
        custom_id: spec
        for custom_id, spec in rows.items()
        if custom_id not in covered and llm.read_cached(spec, name=profile) is None
    }
    like = BatchState(input_sha256="", attempt=0, custom_ids=(), profile=profile, role=role)
    for lines in split_lines(make_lines(llm, missing, name=profile), llm.config.profiles[profile]):
        jobs.append(new_job(llm, lines, states, like=like, prefix=state_prefix))
    return jobs


def find_unfinished(
    llm: LlmService,
    rows: Mapping[str, RequestSpec[BaseModel]],
    states: list[BatchState],
    *,
    profile: str,
    state_prefix: str,
) -> list[BatchJob]:
    """Return the jobs of earlier runs whose rows are all requested again: their lines are rebuilt from them."""
    jobs: list[BatchJob] = []
    covered: set[str] = set()
    for state in states:
        is_ours = state.profile == profile and set(state.custom_ids) <= set(rows)
        if not state.is_collected and is_ours and not covered & set(state.custom_ids):
            lines = make_lines(llm, {custom_id: rows[custom_id] for custom_id in state.custom_ids}, name=profile)
            jobs.append(BatchJob(llm, lines, state, state_prefix=state_prefix))
            covered.update(state.custom_ids)
    return jobs


def make_lines(llm: LlmService, rows: Mapping[str, RequestSpec[BaseModel]], *, name: str) -> dict[str, bytes]:
    """Return one JSONL line per custom id. Sorted ids and keys make the file's digest reproducible."""
    if not rows:
        return {}
    profile, response_format = llm.config.profiles[name], llm.response_format(name)
    return {
        custom_id: json.dumps(
            {
                "custom_id": custom_id,
                "method": "POST",
                "url": ENDPOINT,
                "body": rows[custom_id].body(profile, response_format),
            },
            sort_keys=True,
        ).encode()
        + b"\n"
        for custom_id in sorted(rows)
    }


def split_lines(lines: dict[str, bytes], profile: ProfileConfig) -> list[dict[str, bytes]]:
    """Split lines into files within the limits on rows and bytes, and the profile's limit on input tokens."""
    chunks: list[dict[str, bytes]] = []
    size = tokens = 0
    for custom_id, line in lines.items():
        count = count_body_tokens(json.loads(line)["body"], profile)[0] if profile.batch_tokens else 0
        # Without batch_tokens, both sides of the second comparison are 0.
        is_over = size + len(line) > MAX_BYTES or tokens + count > (profile.batch_tokens or 0)
        if not chunks or is_over or len(chunks[-1]) >= MAX_ROWS:
            chunks.append({})
            size = tokens = 0
        chunks[-1][custom_id] = line
        size, tokens = size + len(line), tokens + count
    return chunks
