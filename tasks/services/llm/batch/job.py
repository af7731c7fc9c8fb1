"""One remote batch job: its state in the store, submitted once, polled, and collected row by row.

planned -> submitting (steps) -> submitted (batch id) -> terminal -> collected
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt, ConfigError, ReplyInvalid, ServiceUnavailable, StillPending
from tasks.services.llm.batch.local import FileBatches, LocalBatches
from tasks.services.llm.batch.openai_api import OpenAiBatches
from tasks.services.llm.batch.provider import (
    LOST,
    TERMINAL,
    UNKNOWN,
    BatchProvider,
    BatchReply,
    R,
    RemoteJob,
    Submission,
)
from tasks.services.llm.batch.xai_api import XaiBatches
from tasks.services.llm.budget.journal import append_line
from tasks.services.llm.budget.ledger import LedgerRow, compute_cost
from tasks.services.llm.chat.completion import Usage, bound_usage
from tasks.services.llm.chat.image_urls import presign_line
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.errors import RequestRefused
from tasks.services.llm.reply_cache import quarantine
from tasks.services.llm.retries import call_with_retries
from tasks.services.llm.service import LlmService
from tasks.services.store.base import Store
from tasks.stage.digests import dump_line, dump_signed, load_signed

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)
# Providers end a job within 24 hours; one whose status is still unreadable after 36 is given up.
UNKNOWN_DEADLINE_SECONDS = 36 * 3600.0
JOB_LOG = "jobs.jsonl"


class BatchState(BaseModel):
    """The persisted progress of a batch job."""

    input_sha256: str
    attempt: int
    custom_ids: tuple[str, ...]
    profile: str = ""
    role: str = ""
    batch_id: str = ""
    status: str = "planned"
    steps: dict[str, str] = {}
    """What the provider saved while it submitted the job."""
    created_at: float = 0.0
    """When the job was submitted, in seconds since the epoch."""
    is_cancelled: bool = False
    """Whether this client cancelled it; its unanswered rows are sent as single requests."""
    reservation: str = ""
    reserved_usd: float = 0.0
    """Reserved in the budget until the job is collected."""
    spent_usd: float | None = 0.0
    """What its rows cost; None where no price is known."""
    is_collected: bool = False
    """Whether every row's outcome is stored: only then may its rows be requested again."""

    @property
    def idempotency_key(self) -> str:
        """The name by which the provider's job is found again."""
        return f"{self.input_sha256}/{self.attempt}"

    @property
    def file_name(self) -> str:
        """The last part of the state's key."""
        return f"{self.input_sha256[:24]}-{self.attempt}.json"

    @property
    def lease_name(self) -> str:
        """The name of the lease that whoever submits, polls or collects the job holds."""
        return f"batch-jobs/{self.file_name.removesuffix('.json')}"


def find_state(store: Store, key: str) -> BatchState | None:
    """Return a verified state; a damaged one is quarantined, and its remote job is found by its idempotency key."""
    data = store.find_bytes(key)
    if data is None:
        return None
    try:
        state = load_signed(BatchState, data)
        if state.file_name != key.rpartition("/")[2]:
            raise ArtifactCorrupt(f"the state is that of {state.file_name}")
    except ArtifactCorrupt as error:
        quarantine(store, key, data, error=error)
        return None
    return state


def list_states(store: Store, prefix: str) -> list[BatchState]:
    """Return all verified states below a prefix."""
    keys = [key for key in store.list_keys(f"{prefix}/") if key.endswith(".json")]
    return [state for key in keys if (state := find_state(store, key)) is not None]


class BatchJob:
    """One remote job, identified by the digest of its input and the attempt."""

    def __init__(self, llm: LlmService, lines: dict[str, bytes], state: BatchState, *, state_prefix: str) -> None:
        self.llm = llm
        self.lines = lines
        self.state = state
        self.name = state.profile
        self.profile = llm.config.profiles[self.name]
        self.state_key = f"{state_prefix}/{state.file_name}"
        self.unanswered: set[str] = set()  # rows that a cancelled job did not reach
        self.is_cancel_sent = False  # not persisted: a resumed run sends the cancellation again
        self.job = RemoteJob("", UNKNOWN)
        self.provider = open_provider(llm, self.name, role=state.role)

    @property
    def is_local(self) -> bool:
        """Whether rows are sent as chat completions, each of which reserves and reports its own cost."""
        return self.profile.capabilities.batch == "local"

    def save(self, **changes: object) -> None:
        """Change the state and store it."""
        self.state = self.state.model_copy(update=changes)
        self.llm.store.put_bytes(self.state_key, dump_signed(self.state))

    def reload(self) -> None:
        """Take over the state that another process may have stored meanwhile; call with the lease held."""
        self.state = find_state(self.llm.store, self.state_key) or self.state

    def log_use(self) -> None:
        """Record beside the ledger that this run waits for this job, by which the job of a killed run is found."""
        row = {"state_key": self.state_key, "profile": self.name, "role": self.state.role}
        append_line(self.llm.ledger.path.with_name(JOB_LOG), dump_line(row).encode())

    def end_early(self) -> bool:
        """Cancel the job, so that calls can replace it; submit none. Return whether there is something to collect."""
        if self.is_local:  # its rows are calls: what is staged is not asked again, the rest is asked as it would be
            return True
        if not self.find_remote():
            self.give_up()
            return False
        job = self.provider.poll(self.state.batch_id)
        if job.status not in TERMINAL:
            self.cancel(job, "of an earlier run")
        return True

    def find_remote(self) -> bool:
        """Whether the provider has the job, found by its key where a killed run did not record it."""
        if not self.state.batch_id:
            try:
                found = self.provider.find(self.state.idempotency_key)
            except RequestRefused as error:  # such as a key that may not use batches: it has submitted none
                log.warning("batch jobs can't be listed and are asked by calls: %s", error)
                found = None
            if found is None:
                return False
            self.save(batch_id=found.job_id, status=found.status, created_at=time.time())
        return self.provider.poll(self.state.batch_id).status != LOST

    def give_up(self) -> None:
        """Mark a job that the provider does not have as done with: its rows may be requested again.

        What was reserved for one that it has lost stays reserved, since it may be billed.
        """
        if self.state.reservation and not self.state.batch_id:
            self.llm.budget.reconcile(self.state.reservation, spent=0.0)
        self.save(is_collected=True, is_cancelled=True)

    def ensure_submitted(self) -> None:
        """Submit the job, unless an earlier attempt did and the provider still has it."""
        if self.state.batch_id and self.provider.poll(self.state.batch_id).status == LOST:
            # The reservation stays, so `_reserve` does not reserve the same rows twice.
            self.save(batch_id="", status="planned", steps={})
        if not self.state.batch_id:
            self.save()  # before the provider is called: a killed run leaves a state to resume from
            submission = Submission(
                self.state.idempotency_key,
                steps=self.state.steps,
                save=lambda steps: self.save(steps=dict(steps), status="submitting"),
                reserve=self._reserve,
            )
            job = self.provider.submit(self._published_lines(), submission)
            self.save(batch_id=job.job_id, status=job.status, created_at=time.time())

    def _reserve(self) -> None:
        """Reserve the worst-case cost of all rows, once per job; local rows reserve their own."""
        if not self.state.reservation and not self.is_local:
            worst = sum(self.price_row(custom_id)[1] or 0.0 for custom_id in self.lines)
            self.save(reservation=self.llm.budget.reserve(worst), reserved_usd=worst)

    def _published_lines(self) -> dict[str, bytes]:
        """Return the lines as they are sent.

        The input digest covers the lines with inline images, since presigned URLs differ at every submission.
        """
        if self.profile.image_urls == "inline":
            return self.lines
        return {custom_id: presign_line(line, self.llm.store) for custom_id, line in self.lines.items()}

    def price_row(self, custom_id: str) -> tuple[Usage, float | None]:
        """Return an upper estimate of a row's tokens, and their price in USD."""
        max_usage = self.llm.reserve_tokens(self.name, json.loads(self.lines[custom_id])["body"])
        return max_usage, compute_cost(self.profile.prices, max_usage, is_batch=not self.is_local)[0]

    def wait(
        self,
        *,
        poll_seconds: float,
        max_wait_seconds: float,
        deadline_seconds: float | None,
        on_progress: Callable[[int], None],
    ) -> None:
        """Poll the job until it ends, at intervals that grow to `poll_seconds`.

        Raises:
            StillPending: it has not ended after `max_wait_seconds`.
            ServiceUnavailable: the provider does not know it any more.

        """
        self.log_use()  # before submission, so that a run killed right after it can be found
        self.ensure_submitted()
        deadline = time.monotonic() + max_wait_seconds
        pause = min(0.2, poll_seconds)
        while True:
            job = self.provider.poll(self.state.batch_id)
            on_progress(min(len(self.lines), job.num_done))
            # Only a change is stored, since every poll would otherwise write to the store.
            if job.status != self.state.status:
                self.save(status=job.status)
            if job.status in TERMINAL:
                self.job = job
                return
            if job.status == LOST:
                raise ServiceUnavailable(f"the provider lost batch job {job.job_id}; run again to submit it again")
            if self._is_past_deadline(job, deadline_seconds) and not self.is_cancel_sent and job.status != "cancelling":
                self.cancel(job, "past its deadline")
                if job.status == UNKNOWN:  # its end would be unreadable too, so what there is is collected now
                    self.job = job
                    return
            if time.monotonic() > deadline:
                raise StillPending(
                    f"batch job {job.job_id} is still {job.status}; `likeness pending` resumes the run, "
                    "`likeness jobs` lists and cancels jobs"
                )
            time.sleep(pause)
            pause = min(poll_seconds, pause * 1.5)

    def _is_past_deadline(self, job: RemoteJob, deadline_seconds: float | None) -> bool:
        if deadline_seconds is None and job.status == UNKNOWN:
            deadline_seconds = UNKNOWN_DEADLINE_SECONDS
        return deadline_seconds is not None and time.time() > self.state.created_at + deadline_seconds

    def cancel(self, job: RemoteJob, why: str) -> None:
        """Cancel a job. Stored before it is sent: after a crash in between, a resumed run sends it again."""
        self.save(is_cancelled=True)
        try:
            self.provider.cancel(job.job_id)
        except (ConfigError, ServiceUnavailable) as error:  # it may have ended just now; the next poll tells
            log.warning("batch job %s, %s, can't be cancelled: %s", job.job_id, why, error)
            return
        self.is_cancel_sent = True
        log.warning("batch job %s, %s, is cancelled; single requests replace its open rows", job.job_id, why)

    def collect_results(self) -> dict[str, BatchReply]:
        """Return one outcome for every row, matched by custom id; rows missing from the results get a reason."""
        outcomes: dict[str, BatchReply] = {}
        # Results are in any order and may hold unknown or repeated ids; the first outcome of a row counts.
        for custom_id, outcome in self.provider.results(self.job):
            if custom_id in self.lines:
                outcomes.setdefault(custom_id, self.bound(custom_id, outcome))
        for custom_id in self.lines:
            outcomes.setdefault(custom_id, self.explain_missing())
        return outcomes

    def bound(self, custom_id: str, outcome: BatchReply) -> BatchReply:
        """Return an outcome whose usage is bounded by the row's reservation."""
        if outcome.completion is None or self.is_local:  # local rows were bounded when they were sent
            return outcome
        max_usage, worst = self.price_row(custom_id)
        return BatchReply(bound_usage(outcome.completion, max_usage, worst_usd=worst))

    def explain_missing(self) -> BatchReply:
        """Return the outcome of a row that is missing from the results, and whether it may have been billed."""
        status, num_files = self.job.status, len(self.job.output_files)
        if self.job.error:
            return BatchReply(None, f"batch job {status}: {self.job.error}")
        lost = f"batch job ended as {status} without this row in its {num_files} output file(s); run again to retry it"
        # A job that ended early did not run its missing rows. A completed or an unreadable one may have, and billed
        # them.
        return BatchReply(None, lost, is_billable=status in ("completed", UNKNOWN))

    def keep(self, rows: Mapping[str, RequestSpec[BaseModel]], *, role: str) -> dict[str, str]:
        """Store every usable reply; return the reasons for all other rows, by custom id."""
        outcomes = self.collect_results()
        reasons = {
            custom_id: self.store_row(rows[custom_id], outcome, role=role) for custom_id, outcome in outcomes.items()
        }
        self.mark_collected(outcomes)  # only after every row is stored: a crash before repeats the collection
        if self.state.is_cancelled:  # by us: the rows that it did not reach are sent as calls
            self.unanswered = {custom_id for custom_id, outcome in outcomes.items() if outcome.completion is None}
        return {custom_id: reason for custom_id, reason in reasons.items() if reason}

    def store_row(self, spec: RequestSpec[BaseModel], outcome: BatchReply, *, role: str) -> str:
        """Store one row's reply, unless an earlier collection did; return why it is unusable, or an empty string."""
        if self.llm.read_cached(spec, name=self.name) is not None:
            return ""
        row = LedgerRow(role, self.name, self.profile.model, outcome="", is_batch=not self.is_local)
        try:
            if outcome.completion is None:
                raise ReplyInvalid(outcome.error)
            self.llm.accept(spec, outcome.completion, row=row)
        except ReplyInvalid as error:
            return str(error)
        return ""

    def mark_collected(self, outcomes: dict[str, BatchReply]) -> None:
        """Reconcile the reservation and mark the job as collected."""
        costs = [self.cost_of(custom_id, outcome) for custom_id, outcome in outcomes.items()]
        spent = None if None in costs else sum(cost for cost in costs if cost is not None)
        # Reconciled first: reconciling again after a crash changes nothing, whereas a collected job is
        # never reconciled again.
        if self.state.reservation:
            self.llm.budget.reconcile(self.state.reservation, spent=self.state.reserved_usd if spent is None else spent)
        self.save(is_collected=True, spent_usd=spent)

    def cost_of(self, custom_id: str, outcome: BatchReply) -> float | None:
        """Return a row's cost in USD: its reservation where it was answered but is unreadable; None if unknown."""
        if outcome.completion is not None:
            return self.llm.price(self.name, outcome.completion, is_batch=not self.is_local)[0]
        return self.price_row(custom_id)[1] if outcome.is_billable else 0.0


def open_provider(llm: LlmService, name: str, *, role: str) -> BatchProvider:
    """Return the batch API of a profile."""
    profile: ProfileConfig = llm.config.profiles[name]
    row = LedgerRow(role, name, profile.model, outcome="")

    def call(ask: Callable[["OpenAI", float], R], *, max_attempts: int = 0) -> R:
        # Without the shared circuit: a failing batch endpoint must not hold up chat completions.
        return call_with_retries(lambda timeout: ask(llm.client(name), timeout), profile, max_attempts=max_attempts)

    match profile.capabilities.batch:
        case "xai":
            return XaiBatches(call)
        case "file":
            return FileBatches(profile, llm.local.batch_folder)
        case "local":
            return LocalBatches(profile, llm.local.batch_folder, ask=lambda body: llm.send(body, row=row))
    return OpenAiBatches(call)
