"""Batch jobs that survive: planned by content, persisted before each step, adopted, harvested.

    planned -> uploaded (file id) -> created (batch id) -> terminal -> harvested row by row

A job is one JSONL file. Its state lies in the store, so a run that was killed at any point goes on
with the same remote job instead of paying for another.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from tasks.errors import ReplyInvalid, ServiceUnavailable
from tasks.services.llm.client import LlmService, T, call_with_retries
from tasks.services.llm.requests import RequestSpec

ENDPOINT = "/v1/chat/completions"
TERMINAL = ("completed", "failed", "expired", "cancelled")
MOST_ROWS, MOST_BYTES = 50_000, 190_000_000  # providers' published limits, with a margin


class BatchState(BaseModel):
    """How far a batch job is."""

    input_sha256: str
    file_id: str = ""
    batch_id: str = ""
    status: str = "planned"


class BatchReply(BaseModel):
    """The outcome of one row: a completion, or the reason there is none."""

    completion: dict[str, Any] | None
    error: str


def ask_batch(
    llm: LlmService,
    specs: dict[str, RequestSpec],
    *,
    role: str,
    reply: type[T],
    state_prefix: str,
    poll_seconds: float,
    max_wait_seconds: float,
    on_progress: Callable[[int, int], None],
) -> tuple[dict[str, tuple[T, str]], dict[str, str]]:
    """Answer many requests through the provider's batch API.

    Args:
        specs: requests by a name of the caller's.
        state_prefix: key prefix in the store for the jobs' state.
        on_progress: called with rows done and rows in all.

    Returns:
        Validated replies with the serving model, and reasons for the rest, both by name.

    """
    answers: dict[str, tuple[T, str]] = {}
    names: dict[str, list[str]] = {}
    for name, spec in specs.items():
        cached = llm.find_cached(spec, role=role, reply=reply)
        if cached is not None:
            answers[name] = cached
        else:
            names.setdefault(spec.compute_key(llm.profile(role)), []).append(name)
    failures: dict[str, str] = {}
    rows = {custom_id: specs[named[0]] for custom_id, named in names.items()}
    num_done = len(answers)
    for chunk in split_rows(llm, rows, role=role):
        job = BatchJob(llm, chunk, role=role, state_prefix=state_prefix)
        job.wait(
            poll_seconds=poll_seconds,
            max_wait_seconds=max_wait_seconds,
            on_progress=lambda done, base=num_done: on_progress(base + done, len(specs)),  # type: ignore[misc]
        )
        for custom_id, row in job.harvest().items():
            for name in names[custom_id]:
                try:
                    if row.completion is None:
                        raise ReplyInvalid(row.error)
                    answers[name] = llm.accept(specs[name], row.completion, role=role, reply=reply, is_batch=True)
                except ReplyInvalid as error:
                    failures[name] = str(error)
        num_done = len(answers) + len(failures)
        on_progress(num_done, len(specs))
    return answers, failures


def split_rows(llm: LlmService, rows: dict[str, RequestSpec], *, role: str) -> list[dict[str, bytes]]:
    """Return JSONL lines by custom id, cut into files within the providers' limits."""
    chunks: list[dict[str, bytes]] = []
    size = MOST_BYTES
    for custom_id, spec in sorted(rows.items()):
        row = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": spec.body(llm.profile(role))}
        line = json.dumps(row, sort_keys=True).encode() + b"\n"
        if size + len(line) > MOST_BYTES or len(chunks[-1]) >= MOST_ROWS:
            chunks.append({})
            size = 0
        chunks[-1][custom_id] = line
        size += len(line)
    return chunks


class BatchJob:
    """One remote job, found again by the digest of its input."""

    def __init__(self, llm: LlmService, lines: dict[str, bytes], *, role: str, state_prefix: str) -> None:
        self.llm = llm
        self.lines = lines
        self.role = role
        self.profile = llm.profile(role)
        self.data = b"".join(lines.values())
        self.input_sha256 = hashlib.sha256(self.data).hexdigest()
        self.state_key = f"{state_prefix}/{self.input_sha256[:24]}.json"
        stored = llm.store.find_bytes(self.state_key)
        self.state = BatchState.model_validate_json(stored) if stored else BatchState(input_sha256=self.input_sha256)

    def _call(self, call: Callable[[Any, float], Any]) -> Any:
        return call_with_retries(lambda timeout: call(self.llm.client(self.role), timeout), self.profile)

    def _save(self, **changes: str) -> None:
        self.state = self.state.model_copy(update=changes)
        self.llm.store.put_bytes(self.state_key, self.state.model_dump_json().encode())

    def ensure_created(self) -> None:
        """Upload and create the job, unless an earlier attempt already did."""
        if self.state.batch_id and self._is_lost():
            self._save(file_id="", batch_id="", status="planned")
        if self.state.batch_id:
            return
        self._save()
        adopted = self._find_remote()
        if adopted is not None:
            self._save(batch_id=adopted.id, file_id=adopted.input_file_id, status=adopted.status)
            return
        name = f"likeness-{self.input_sha256[:24]}.jsonl"
        if not self.state.file_id:
            upload = self._call(
                lambda client, timeout: client.files.create(
                    file=(name, io.BytesIO(self.data)), purpose="batch", timeout=timeout
                )
            )
            self._save(file_id=upload.id, status="uploaded")
        # One attempt only: after a doubtful answer the next run looks for the job by its metadata.
        single = self.profile.model_copy(update={"max_attempts": 1})
        batch = call_with_retries(
            lambda timeout: self.llm.client(self.role).batches.create(
                input_file_id=self.state.file_id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={"likeness_input": self.input_sha256},
                timeout=timeout,
            ),
            single,
        )
        self._save(batch_id=batch.id, status=batch.status)

    def _is_lost(self) -> bool:
        """Whether the provider no longer knows the job, as after the local server's end."""
        import openai

        try:
            self.llm.client(self.role).batches.retrieve(self.state.batch_id, timeout=30)
        except openai.NotFoundError:
            return True
        except openai.OpenAIError:
            return False
        return False

    def _find_remote(self) -> Any | None:
        """Return a live or finished remote job with this very input."""
        page = self._call(lambda client, timeout: client.batches.list(limit=100, timeout=timeout))
        for batch in page.data:
            is_ours = (batch.metadata or {}).get("likeness_input") == self.input_sha256
            num_failed = batch.request_counts.failed if batch.request_counts else 0
            if is_ours and not num_failed and batch.status not in ("failed", "cancelled", "cancelling"):
                return batch
        return None

    def wait(self, *, poll_seconds: float, max_wait_seconds: float, on_progress: Callable[[int], None]) -> None:
        """Look at the job until it ends, with pauses that grow to `poll_seconds`."""
        self.ensure_created()
        deadline = time.monotonic() + max_wait_seconds
        pause = min(0.2, poll_seconds)
        while True:
            batch = self._call(lambda client, timeout: client.batches.retrieve(self.state.batch_id, timeout=timeout))
            counts = batch.request_counts
            on_progress(min(len(self.lines), counts.completed + counts.failed) if counts else 0)
            if batch.status != self.state.status:
                self._save(status=batch.status)
            if batch.status in TERMINAL:
                self.batch = batch
                return
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"batch job {batch.id} is still {batch.status}; run again to pick it up")
            time.sleep(pause)
            pause = min(poll_seconds, pause * 1.5)

    def harvest(self) -> dict[str, BatchReply]:
        """Return one outcome per row, matched by custom id; rows without any are named too."""
        outcomes: dict[str, BatchReply] = {}
        for file_id in (self.batch.output_file_id, self.batch.error_file_id):
            if file_id:
                content = self._call(lambda client, timeout: client.files.content(file_id, timeout=timeout))  # noqa: B023
                for line in content.text.splitlines():
                    row = json.loads(line)
                    if row.get("custom_id") in self.lines:
                        outcomes.setdefault(row["custom_id"], read_row(row))
        reason = f"batch job ended as {self.batch.status} without this row"
        for custom_id in self.lines:
            outcomes.setdefault(custom_id, BatchReply(completion=None, error=reason))
        if any(outcome.completion is None for outcome in outcomes.values()):
            # The rows that failed are asked anew by the next attempt, in a job of their own.
            self.llm.store.delete(self.state_key)
        return outcomes


def read_row(row: dict[str, Any]) -> BatchReply:
    """Sort one line of an output or error file."""
    response = row.get("response") or {}
    if row.get("error") is None and response.get("status_code") == 200:
        return BatchReply(completion=response.get("body"), error="")
    detail = row.get("error") or (response.get("body") or {}).get("error") or {}
    message = detail.get("message") if isinstance(detail, dict) else str(detail)
    return BatchReply(completion=None, error=str(message or f"status {response.get('status_code')}"))
