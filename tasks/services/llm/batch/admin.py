"""Manage batch jobs outside of a run: show, adopt, cancel and discard them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tasks.errors import ConfigError, StillPending
from tasks.services.llm.batch.job import BatchState, find_state, open_provider
from tasks.services.llm.batch.provider import TERMINAL, BatchProvider, RemoteJob
from tasks.services.llm.budget.ledger import LedgerRow
from tasks.services.llm.chat.completion import ChatCompletion, Usage, bound_usage
from tasks.services.llm.chat.response_format import read_content
from tasks.services.llm.reply_cache import CachedReply, find_record, put_record
from tasks.services.llm.service import LlmService
from tasks.services.store.lease import hold_lease
from tasks.stage.digests import dump_signed


@dataclass(frozen=True)
class JobHandle:
    """A batch job and the key of its state."""

    llm: LlmService
    state: BatchState
    state_key: str
    """Empty for a job that only the provider knows."""

    @property
    def job_id(self) -> str:
        """The provider's id, or the state's own name before there is one."""
        return self.state.batch_id or self.state.file_name.removesuffix(".json")

    def provider(self) -> BatchProvider:
        """Return the batch API of the job's profile."""
        name = self.state.profile
        if name not in self.llm.config.profiles:
            raise ConfigError(f"job {self.job_id} is of profile {name!r}, which its run's configuration lacks")
        return open_provider(self.llm, name, role=self.state.role)

    def save(self, **changes: object) -> None:
        """Store the state with changes; nothing for a job without a state."""
        if self.state_key:
            self.llm.store.put_bytes(self.state_key, dump_signed(self.state.model_copy(update=changes)))


def retrieve(job: JobHandle) -> RemoteJob:
    """Return a job as its provider reports it. Raises ConfigError where it is not submitted yet."""
    if not job.state.batch_id:
        raise ConfigError(f"job {job.job_id} is {job.state.status}: the provider doesn't have it yet; run again")
    return job.provider().poll(job.state.batch_id)


def cancel(job: JobHandle) -> None:
    """Cancel a job; the next run keeps its replies and sends the other rows as calls."""
    with leased(job) as current:
        remote = retrieve(current)
        current.save(is_cancelled=True)
        if remote.status not in TERMINAL:
            current.provider().cancel(current.state.batch_id)


def discard(job: JobHandle) -> float:
    """Mark a job as collected without its results; return the USD that stay reserved, since it may be billed."""
    with leased(job) as current:
        if current.state.is_collected:  # meanwhile, by a run: its replies are cached and its cost is known
            return 0.0
        current.save(is_collected=True, is_cancelled=True)
    return current.state.reserved_usd


def adopt(job: JobHandle) -> tuple[int, float | None]:
    """Cache an ended job's replies, so that no run pays for them again; return their number and cost in USD.

    They are validated when a run reads them. Raises StillPending where the job has not ended.
    """
    with leased(job) as current:
        if current.state.is_collected:
            return 0, 0.0
        remote = retrieve(current)
        if remote.status not in TERMINAL:
            raise StillPending(f"batch job {current.job_id} is {remote.status}; adopt it when it has ended")
        count, costs = 0, list[float | None]()
        for custom_id, outcome in current.provider().results(remote):
            if outcome.completion is not None and is_ours(current.state, custom_id):
                costs.append(store_reply(current, custom_id, outcome.completion))
                count += 1
        spent = None if None in costs else sum(cost for cost in costs if cost is not None)
        state = current.state
        if state.reservation:
            current.llm.budget.reconcile(state.reservation, spent=state.reserved_usd if spent is None else spent)
        current.save(is_collected=True, status=remote.status, spent_usd=spent)
    return count, spent


def is_ours(state: BatchState, custom_id: str) -> bool:
    """Whether a row belongs to the job; without a state, whether its id looks like one of our request digests."""
    if state.custom_ids:
        return custom_id in state.custom_ids
    return len(custom_id) == 40 and set(custom_id) <= set("0123456789abcdef")


def store_reply(job: JobHandle, custom_id: str, completion: ChatCompletion) -> float | None:
    """Store one row's reply and record it in the ledger; return its cost in USD."""
    llm, name = job.llm, job.state.profile
    profile = llm.config.profiles[name]
    key = f"llm/replies/{custom_id}.json"
    share = job.state.reserved_usd / max(1, len(job.state.custom_ids))
    max_usage = Usage(output_tokens=profile.max_output_tokens + profile.reasoning_tokens, input_tokens=10**6)
    # The request is not available here, so an equal share of the job's reservation stands in for its worst case.
    completion = bound_usage(completion, max_usage, worst_usd=share or None)
    if completion.usage_fault:  # the ledger shows the share alone, not the million tokens of `max_usage`
        completion = replace(completion, usage=Usage(reported_usd=share))
    row = llm.fill_row(completion, LedgerRow(job.state.role, name, profile.model, outcome="ok", is_batch=True))
    is_usable = not completion.problem and not completion.refusal and completion.finish_reason != "length"
    content = read_content(completion, llm.response_format(name)) if is_usable else None
    # A reply that is cached is kept: a run has validated it, or an interrupted `adopt` stored it. Its row is recorded.
    if content and find_record(llm.store, CachedReply, key) is not None:
        return row.cost_usd
    if content:
        put_record(llm.store, CachedReply(key=key, content=content, served_model=completion.model))
    llm.ledger.record(row if content else replace(row, outcome="invalid"))
    return row.cost_usd


@contextmanager
def leased(job: JobHandle) -> Iterator[JobHandle]:
    """Hold the job's lease without waiting, and yield the job with its state as it is now.

    A run may have submitted or collected it since the state was read. Raises StillPending where a running process
    holds the lease.
    """
    name = job.state.lease_name if job.state_key else f"batch-jobs/{job.job_id}"
    with hold_lease(job.llm.store, name, max_wait_seconds=0.0, poll_seconds=0.1, on_wait=lambda who: None):
        state = find_state(job.llm.store, job.state_key) if job.state_key else None
        yield replace(job, state=state or job.state)
