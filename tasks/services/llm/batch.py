"""Batch jobs that survive: planned by content, persisted before each step, adopted, harvested.

    planned -> uploaded (file id) -> created (batch id) -> terminal -> harvested row by row

A job is one JSONL file. Its state lies in the store, so a run that was killed at any point goes on
with the same remote job instead of paying for another.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.errors import ConfigError, ReplyInvalid, ServiceUnavailable, StillPending
from tasks.services.llm.batch_files import FileBatches, LocalBatches
from tasks.services.llm.batch_openai import OpenAiBatches
from tasks.services.llm.batch_protocol import ENDPOINT, TERMINAL, BatchProvider, BatchReply, Call, RemoteJob
from tasks.services.llm.batch_xai import XaiBatches
from tasks.services.llm.calls import ask_each
from tasks.services.llm.client import Answer, LlmService
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.ledger import LedgerRow, Usage, compute_cost
from tasks.services.llm.pacing import Pace
from tasks.services.llm.pictures import publish_line
from tasks.services.llm.requests import RequestSpec, count_body_tokens
from tasks.services.llm.transport import call_with_retries

log = logging.getLogger(__name__)
MOST_ROWS, MOST_BYTES = 50_000, 190_000_000  # providers' published limits, with a margin


class BatchState(BaseModel):
    """How far a batch job is."""

    input_sha256: str
    attempt: int
    custom_ids: tuple[str, ...]
    file_id: str = ""
    batch_id: str = ""
    status: str = "planned"
    created_at: float = 0.0
    """When the provider took it, in seconds since 1970."""
    is_cancelled: bool = False
    """Whether we have given it up: what it lacks is asked one by one."""
    is_filled: bool = False
    """Whether the job has all its rows."""
    reservation: str = ""
    reserved_usd: float = 0.0
    """What is set aside of the budget until the job is harvested."""
    is_harvested: bool = False
    """Whether every row's outcome is stored: only then may its rows be asked again."""


def ask_batch(
    llm: LlmService,
    specs: dict[str, RequestSpec[Any]],
    *,
    role: str,
    state_prefix: str,
    poll_seconds: float,
    max_wait_seconds: float,
    deadline_seconds: float | None = None,
    on_progress: Callable[[int, int], None],
) -> tuple[dict[str, Answer[Any]], dict[str, str]]:
    """Answer many requests through the batch API of a role's first profile.

    Args:
        specs: requests by a name of the caller's.
        state_prefix: key prefix in the store for the jobs' state.
        max_wait_seconds: longest wait in this process.
        deadline_seconds: a job that has not ended so long after it was created is cancelled, and asked in calls.
        on_progress: called with rows done and rows in all.

    Returns:
        Validated replies, and reasons for the rest, both by name.

    """
    profile = llm.config.rungs(role)[0]
    names: dict[str, list[str]] = {}
    for name, spec in specs.items():
        names.setdefault(spec.compute_key(llm.config.profiles[profile]), []).append(name)
    rows = {custom_id: specs[named[0]] for custom_id, named in names.items()}
    answers: dict[str, Answer[Any]] = {}
    for name, spec in specs.items():
        cached = llm.find_cached(spec, name=profile, role=role)
        if cached is not None:
            answers[name] = cached
    failures: dict[str, str] = {}
    left: dict[str, str] = {}
    jobs = plan_jobs(llm, rows, name=profile, state_prefix=state_prefix)
    for job in jobs:
        done_before = sum(len(other.lines) for other in jobs[: jobs.index(job)])
        job.wait(
            poll_seconds=poll_seconds,
            max_wait_seconds=max_wait_seconds,
            deadline_seconds=deadline_seconds,
            on_progress=lambda done, base=done_before: on_progress(base + done, len(specs)),  # type: ignore[misc]
        )
        for custom_id, reason in job.keep(rows, role=role).items():
            (left if custom_id in job.unanswered else failures).update(dict.fromkeys(names[custom_id], reason))
    asked, failed = ask_each(
        {name: specs[name] for name in left}, llm=llm, role=role, on_progress=lambda done, total: None
    )
    for name, spec in specs.items():
        if name not in {**failures, **failed, **answers, **asked}:
            kept = llm.read_kept(spec, name=profile)
            if kept is None:
                failures[name] = "no reply was kept for this row"
            else:
                answers[name] = kept
    on_progress(len(specs), len(specs))
    return {**answers, **asked}, {**failures, **failed}


def plan_jobs(llm: LlmService, rows: dict[str, RequestSpec[Any]], *, name: str, state_prefix: str) -> list["BatchJob"]:
    """Return the jobs that earlier attempts left unfinished, then new ones for rows in none of them."""
    states = [
        BatchState.model_validate_json(llm.store.find_bytes(key) or b"")
        for key in llm.store.list_keys(f"{state_prefix}/")
    ]
    jobs: list[BatchJob] = []
    covered: set[str] = set()
    for state in states:
        if not state.is_harvested and set(state.custom_ids) <= set(rows):
            lines = make_lines(llm, {custom_id: rows[custom_id] for custom_id in state.custom_ids}, name=name)
            jobs.append(BatchJob(llm, lines, state, name=name, state_prefix=state_prefix))
            covered.update(state.custom_ids)
    missing = {
        custom_id: spec
        for custom_id, spec in rows.items()
        if custom_id not in covered and llm.read_kept(spec, name=name) is None
    }
    for lines in split_lines(make_lines(llm, missing, name=name), llm.config.profiles[name]):
        sha256 = hashlib.sha256(b"".join(lines.values())).hexdigest()
        attempt = sum(state.input_sha256 == sha256 for state in states)
        state = BatchState(input_sha256=sha256, attempt=attempt, custom_ids=tuple(lines))
        jobs.append(BatchJob(llm, lines, state, name=name, state_prefix=state_prefix))
    return jobs


def keep_row(llm: LlmService, spec: RequestSpec[Any], outcome: BatchReply, *, role: str, name: str) -> str:
    """Store one row's reply, unless an earlier attempt did; return why it can't be, or nothing."""
    if llm.read_kept(spec, name=name) is not None:
        return ""
    row = LedgerRow(role, name, llm.config.profiles[name].model, outcome="", is_batch=True)
    try:
        if outcome.completion is None:
            raise ReplyInvalid(outcome.error)
        llm.accept(spec, outcome.completion, row=row)
    except ReplyInvalid as error:
        return str(error)
    return ""


def make_lines(llm: LlmService, rows: dict[str, RequestSpec[Any]], *, name: str) -> dict[str, bytes]:
    """Return one JSONL line per custom id, in order of id."""
    if not rows:
        return {}
    profile, structure = llm.config.profiles[name], llm.structure(name)
    return {
        custom_id: json.dumps(
            {
                "custom_id": custom_id,
                "method": "POST",
                "url": ENDPOINT,
                "body": rows[custom_id].body(profile, structure),
            },
            sort_keys=True,
        ).encode()
        + b"\n"
        for custom_id in sorted(rows)
    }


def split_lines(lines: dict[str, bytes], profile: ProfileConfig) -> list[dict[str, bytes]]:
    """Cut lines into files within the providers' limits on rows and bytes, and the profile's on tokens."""
    chunks: list[dict[str, bytes]] = []
    size = tokens = 0
    for custom_id, line in lines.items():
        count = count_body_tokens(json.loads(line)["body"], profile)[0] if profile.batch_tokens else 0
        is_over = size + len(line) > MOST_BYTES or tokens + count > (profile.batch_tokens or 0)
        if not chunks or is_over or len(chunks[-1]) >= MOST_ROWS:
            chunks.append({})
            size = tokens = 0
        chunks[-1][custom_id] = line
        size, tokens = size + len(line), tokens + count
    return chunks


class BatchJob:
    """One remote job, found again by the digest of its input."""

    def __init__(
        self, llm: LlmService, lines: dict[str, bytes], state: BatchState, *, name: str, state_prefix: str
    ) -> None:
        self.llm = llm
        self.lines = lines
        self.state = state
        self.name = name
        self.profile = llm.config.profiles[name]
        self.state_key = f"{state_prefix}/{state.input_sha256[:24]}-{state.attempt}.json"
        self.mark = f"{state.input_sha256}/{state.attempt}"
        self.unanswered: set[str] = set()
        self.is_cancel_sent = False
        self.provider = open_provider(
            self.profile,
            call=self._call,
            client=lambda: llm.client(name),
            folder=llm.batch_folder,
            pace=llm.pace(name),
        )

    def _call(self, call: Callable[[Any, float], Any], profile: ProfileConfig | None = None) -> Any:
        return call_with_retries(lambda timeout: call(self.llm.client(self.name), timeout), profile or self.profile)

    def _save(self, **changes: str | bool | float) -> None:
        self.state = self.state.model_copy(update=changes)
        self.llm.store.put_bytes(self.state_key, self.state.model_dump_json().encode())

    def ensure_created(self) -> None:
        """Upload and create the job, unless an earlier attempt already did; add the rows that it lacks."""
        if self.state.batch_id and self.provider.is_lost(self.state.batch_id):
            self._save(file_id="", batch_id="", status="planned", is_filled=False)
        if not self.state.batch_id:
            self._save()
            job = self.provider.find(self.mark) or self._create()
            file_id = job.file_id or self.state.file_id
            self._save(batch_id=job.job_id, file_id=file_id, status=job.status, created_at=time.time())
        if not self.state.is_filled:
            self.provider.fill(RemoteJob(self.state.batch_id, self.state.status), self._published_lines())
            self._save(is_filled=True)

    def _create(self) -> RemoteJob:
        if not self.state.file_id:
            self._save(file_id=self.provider.upload(self._published_lines(), self.mark), status="uploaded")
        if not self.state.reservation:
            worst = self.worst_case()
            self._save(reservation=self.llm.budget.reserve(worst), reserved_usd=worst)
        # One attempt only: after a doubtful answer the next run looks for the job by its mark.
        single = self.profile.model_copy(update={"max_attempts": 1})
        return self.provider.create(self.state.file_id, self.mark, call=lambda call: self._call(call, single))

    def _published_lines(self) -> dict[str, bytes]:
        """Return the lines as they are sent; a job's name goes by those with the pictures inside."""
        if self.profile.pictures == "inline":
            return self.lines
        return {custom_id: publish_line(line, self.llm.store) for custom_id, line in self.lines.items()}

    def worst_case(self) -> float:
        """Return the most that the job could cost."""
        usage = Usage()
        for line in self.lines.values():
            tokens = count_body_tokens(json.loads(line)["body"], self.profile)
            usage = Usage(usage.input_tokens + tokens[0], output_tokens=usage.output_tokens + tokens[1])
        return compute_cost(self.profile.prices, usage, is_batch=True)[0] or 0.0

    def wait(
        self,
        *,
        poll_seconds: float,
        max_wait_seconds: float,
        deadline_seconds: float | None,
        on_progress: Callable[[int], None],
    ) -> None:
        """Look at the job until it ends, with pauses that grow to `poll_seconds`."""
        self.ensure_created()
        deadline = time.monotonic() + max_wait_seconds
        pause = min(0.2, poll_seconds)
        while True:
            job = self.provider.look(self.state.batch_id)
            on_progress(min(len(self.lines), job.num_done))
            if job.status != self.state.status:
                self._save(status=job.status)
            if job.status in TERMINAL:
                self.job = job
                return
            is_late = deadline_seconds is not None and time.time() > self.state.created_at + deadline_seconds
            if is_late and not self.is_cancel_sent and job.status != "cancelling":
                self._cancel(job)
            if time.monotonic() > deadline:
                raise StillPending(f"batch job {job.job_id} is still {job.status}; `likeness pending` goes on with it")
            time.sleep(pause)
            pause = min(poll_seconds, pause * 1.5)

    def _cancel(self, job: RemoteJob) -> None:
        """Give the job up; noted first, so that a run that ends in between sends it again."""
        self._save(is_cancelled=True)
        try:
            self.provider.cancel(job.job_id)
        except (ConfigError, ServiceUnavailable) as error:  # perhaps it has just ended: the next look will tell
            log.warning("batch job %s is late and can't be cancelled: %s", job.job_id, error)
            return
        self.is_cancel_sent = True
        log.warning("batch job %s is late and cancelled; the rest is asked by calls", job.job_id)

    def harvest(self) -> dict[str, BatchReply]:
        """Return one outcome per row, matched by custom id; rows without any are named too."""
        outcomes: dict[str, BatchReply] = {}
        for custom_id, outcome in self.provider.read(self.job):
            if custom_id in self.lines:
                outcomes.setdefault(custom_id, outcome)
        reason = f"batch job ended as {self.job.status} without this row"
        if self.job.error:
            reason = f"batch job {self.job.status}: {self.job.error}"
        for custom_id in self.lines:
            outcomes.setdefault(custom_id, BatchReply(completion=None, error=reason))
        return outcomes

    def keep(self, rows: dict[str, RequestSpec[Any]], *, role: str) -> dict[str, str]:
        """Store every reply, and return why the others can't be, by custom id."""
        outcomes = self.harvest()
        reasons = {
            custom_id: keep_row(self.llm, rows[custom_id], outcome, role=role, name=self.name)
            for custom_id, outcome in outcomes.items()
        }
        self.mark_harvested(outcomes)
        if self.state.is_cancelled:  # by us: what it didn't come to is asked otherwise
            self.unanswered = {custom_id for custom_id, outcome in outcomes.items() if outcome.completion is None}
        return {custom_id: reason for custom_id, reason in reasons.items() if reason}

    def mark_harvested(self, outcomes: dict[str, BatchReply]) -> None:
        """Note that every row's outcome is stored, and give back what of the budget was not needed."""
        if self.state.reservation:
            costs = [
                self.llm.price(self.name, outcome.completion, is_batch=True)[0]
                for outcome in outcomes.values()
                if outcome.completion is not None
            ]
            spent = self.state.reserved_usd if None in costs else sum(cost for cost in costs if cost is not None)
            self.llm.budget.settle(self.state.reservation, reserved=self.state.reserved_usd, spent=spent)
        self._save(is_harvested=True)


def open_provider(
    profile: ProfileConfig, *, call: Call, client: Callable[[], Any], folder: Path, pace: Pace
) -> BatchProvider:
    """Return the profile's way of running batch jobs."""
    kind = profile.capabilities.batch
    if kind == "xai":
        return XaiBatches(call, client)
    if kind == "file":
        return FileBatches(profile, folder)
    if kind == "local":
        return LocalBatches(profile, folder, call, pace)
    return OpenAiBatches(call, client)
