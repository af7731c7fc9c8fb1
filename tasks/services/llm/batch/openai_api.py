"""Batch jobs by OpenAI's protocol: files in, files out (platform.openai.com/docs/api-reference/batch)."""

import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

from tasks.services.llm.batch.provider import (
    ENDPOINT,
    MOST_LISTED,
    STATUSES,
    UNKNOWN,
    BatchReply,
    Call,
    RemoteJob,
    is_unknown,
    read_count,
    read_lines,
    read_response,
)
from tasks.services.llm.chat.completion import clean_line, read_error
from tasks.services.llm.errors import EndpointUnavailable, RequestRefused

log = logging.getLogger(__name__)
LIMIT_CODES = ("token_limit_exceeded", "enqueued_token_limit_exceeded")


class OpenAiBatches:
    """A job of one file, found again by its metadata."""

    def __init__(self, call: Call, client: Callable[[], Any]) -> None:
        self.call = call
        self.client = client

    def find(self, idempotency_key: str) -> RemoteJob | None:
        """Look through the newest jobs for our metadata."""
        for batch in self.list_newest():
            metadata = batch.get("metadata")
            if isinstance(metadata, dict) and metadata.get("likeness_input") == idempotency_key and batch.get("id"):
                return describe(batch)
        return None

    def list_newest(self) -> Iterator[dict[str, Any]]:
        """Yield the newest jobs as the provider describes them."""
        after: dict[str, str] = {}
        for _ in range(MOST_LISTED // 100):
            page = read_response(
                self.call(
                    lambda client, timeout: client.batches.with_raw_response.list(limit=100, timeout=timeout, **after)  # noqa: B023
                )
            )
            rows = page.get("data") if isinstance(page, dict) else None
            batches = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            yield from batches
            last = batches[-1].get("id") if batches else None
            if not page.get("has_more") or not isinstance(last, str) or after.get("after") == last:
                return
            after = {"after": last}

    def is_lost(self, job_id: str) -> bool:
        """Ask for the job; only a clear no counts."""
        return is_unknown(lambda: self.client().batches.with_raw_response.retrieve(job_id, timeout=30))

    def upload(self, lines: dict[str, bytes], idempotency_key: str) -> str:
        """Upload one JSONL file."""
        data, name = b"".join(lines.values()), f"likeness-{idempotency_key[:24]}.jsonl"
        upload = read_response(
            self.call(
                lambda client, timeout: client.files.with_raw_response.create(
                    file=(name, io.BytesIO(data)), purpose="batch", timeout=timeout
                )
            )
        )
        return read_id(upload, "file")

    def create(self, file_id: str, idempotency_key: str, *, call: Call) -> RemoteJob:
        """Create the job of a file."""
        batch = read_response(
            call(
                lambda client, timeout: client.batches.with_raw_response.create(
                    input_file_id=file_id,
                    endpoint=ENDPOINT,
                    completion_window="24h",
                    metadata={"likeness_input": idempotency_key},
                    timeout=timeout,
                )
            )
        )
        read_id(batch, "batch job")
        return describe(batch)

    def add_requests(self, job: RemoteJob, lines: dict[str, bytes]) -> None:
        """Do nothing: the file had all rows."""

    def retrieve(self, job_id: str) -> RemoteJob:
        """Retrieve the job."""
        shown = self.call(lambda client, timeout: client.batches.with_raw_response.retrieve(job_id, timeout=timeout))
        return describe(read_response(shown), job_id=job_id)

    def cancel(self, job_id: str) -> None:
        """Cancel the job; it may take minutes until it says so."""
        self.call(lambda client, timeout: client.batches.with_raw_response.cancel(job_id, timeout=timeout))

    def read(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Read output and error file alike; the rows of a file that is gone are without an outcome."""
        for file_id in job.output_files:
            try:
                content = self.call(
                    lambda client, timeout: client.files.with_raw_response.content(file_id, timeout=timeout)  # noqa: B023
                )
            except RequestRefused as error:
                if error.status not in (404, 410):
                    raise
                log.warning("output file %s of batch job %s is gone; its rows are asked anew", file_id, job.job_id)
                continue
            yield from read_lines(content.content)


def read_id(value: Any, what: str) -> str:
    """Return the id of what a provider made. Raises EndpointUnavailable where it names none."""
    found = value.get("id") if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        raise EndpointUnavailable(f"the provider made a {what} without an id; run again to resume")
    return found


def describe(batch: Any, *, job_id: str = "") -> RemoteJob:
    """Return a job as ours, whatever its shape: what can't be read has an unknown status."""
    if not isinstance(batch, dict):
        return RemoteJob(job_id, UNKNOWN)
    counts, errors = batch.get("request_counts"), batch.get("errors")
    counts = counts if isinstance(counts, dict) else {}
    rows = errors.get("data") if isinstance(errors, dict) else None
    first = rows[0] if isinstance(rows, list) and rows else None
    error = read_error(first) if first else ""
    code = first.get("code") if isinstance(first, dict) else None
    status, files = batch.get("status"), (batch.get("output_file_id"), batch.get("error_file_id"))
    found = batch.get("id")
    return RemoteJob(
        job_id=job_id or (clean_line(found, limit=200) if isinstance(found, str) else ""),
        status=status if isinstance(status, str) and status in STATUSES else UNKNOWN,
        num_done=read_count(counts.get("completed")) + read_count(counts.get("failed")),
        num_rows=read_count(counts.get("total")),
        file_id=batch["input_file_id"] if isinstance(batch.get("input_file_id"), str) else "",
        error=error,
        is_over_limit=code in LIMIT_CODES or "enqueued token limit" in error.lower(),
        output_files=tuple(file for file in files if isinstance(file, str) and file),
    )
