"""OpenAI's Batch API: files in, files out (platform.openai.com/docs/api-reference/batch)."""

import io
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from tasks.services.llm.batch.provider import (
    ENDPOINT,
    MAX_LISTED,
    STATUSES,
    UNKNOWN,
    BatchReply,
    Call,
    RawResponse,
    RemoteJob,
    Submission,
    poll_or_lost,
    read_count,
    read_lines,
    read_response,
)
from tasks.services.llm.chat.completion import clean_line, read_error
from tasks.services.llm.errors import EndpointUnavailable, RequestRefused

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)
LIMIT_CODES = ("token_limit_exceeded", "enqueued_token_limit_exceeded")


class OpenAiBatches:
    """One input file per job; `metadata` holds the idempotency key, by which the job is found again."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def submit(self, lines: Mapping[str, bytes], submission: Submission) -> RemoteJob:
        """Upload the file, then create the job; a file uploaded by an earlier attempt is reused while it exists."""
        # A run killed between `create` and the next save has a job whose id it never stored: adopt it.
        found = self.find(submission.key)
        if found is not None:
            return found
        earlier = submission.steps.get("file_id", "")
        file_id = earlier or self.upload(lines, submission)
        submission.reserve()  # after the upload, which is free, and before the job, which is billed
        try:
            return self.create(file_id, submission.key)
        except RequestRefused as error:
            if not earlier or error.status not in (400, 404):
                raise
            return self.create(self.upload(lines, submission), submission.key)  # the earlier file has expired

    def find(self, key: str) -> RemoteJob | None:
        """Return the job with this idempotency key among the MAX_LISTED newest, or None."""
        for batch in self.list_newest():
            metadata = batch.get("metadata")
            if isinstance(metadata, dict) and metadata.get("likeness_input") == key and batch.get("id"):
                return describe(batch)
        return None

    def list_newest(self) -> Iterator[dict[str, object]]:
        """Yield the newest jobs, at most MAX_LISTED."""
        after = ""
        for _ in range(MAX_LISTED // 100):
            page = read_response(self.call(partial(list_page, after=after)))
            if not isinstance(page, dict):
                return
            rows = page.get("data")
            batches = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            yield from batches
            last = batches[-1].get("id") if batches else None
            # A server that ignores `after` repeats its first page.
            if not page.get("has_more") or not isinstance(last, str) or after == last:
                return
            after = last

    def upload(self, lines: Mapping[str, bytes], submission: Submission) -> str:
        """Upload one JSONL file and return its id."""
        data, name = b"".join(lines.values()), f"likeness-{submission.key[:24]}.jsonl"
        # Uploads are retried, unlike `create`: a duplicate input file costs nothing.
        upload = read_response(
            self.call(
                lambda client, timeout: client.files.with_raw_response.create(
                    file=(name, io.BytesIO(data)), purpose="batch", timeout=timeout
                )
            )
        )
        file_id = read_id(upload, "file")
        submission.save({"file_id": file_id})
        return file_id

    def create(self, file_id: str, key: str) -> RemoteJob:
        """Create the job in one attempt: a retry after a lost response would create a second, billed job.

        After such a failure, the next run finds the job by its key.
        """
        batch = read_response(
            self.call(
                lambda client, timeout: client.batches.with_raw_response.create(
                    input_file_id=file_id,
                    endpoint=ENDPOINT,
                    completion_window="24h",  # the only one on offer
                    metadata={"likeness_input": key},
                    timeout=timeout,
                ),
                max_attempts=1,
            )
        )
        read_id(batch, "batch job")
        return describe(batch)

    def poll(self, job_id: str) -> RemoteJob:
        """Retrieve the job."""

        def retrieve() -> RemoteJob:
            shown = self.call(
                lambda client, timeout: client.batches.with_raw_response.retrieve(job_id, timeout=timeout)
            )
            return describe(read_response(shown), job_id=job_id)

        return poll_or_lost(job_id, retrieve)

    def cancel(self, job_id: str) -> None:
        """Request cancellation; the job may stay `cancelling` for minutes."""
        self.call(lambda client, timeout: client.batches.with_raw_response.cancel(job_id, timeout=timeout))

    def results(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Yield the rows of output and error file; a deleted or expired file yields none."""
        for file_id in job.output_files:
            try:
                content = self.call(
                    lambda client, timeout: client.files.with_raw_response.content(file_id, timeout=timeout)  # noqa: B023
                )
            except RequestRefused as error:
                if error.status not in (404, 410):
                    raise
                log.warning("output file %s of batch job %s is gone; its rows are submitted again", file_id, job.job_id)
                continue
            yield from read_lines(content.content)


def read_id(value: object, what: str) -> str:
    """Return the id of a created object. Raises EndpointUnavailable where it has none."""
    found = value.get("id") if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        raise EndpointUnavailable(f"the provider made a {what} without an id; run again to resume")
    return found


def describe(batch: object, *, job_id: str = "") -> RemoteJob:
    """Return a provider's job, of any shape, as a RemoteJob; an unreadable status is UNKNOWN, not an error."""
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
        error=error,
        is_over_limit=code in LIMIT_CODES or "enqueued token limit" in error.lower(),
        output_files=tuple(file for file in files if isinstance(file, str) and file),
    )


def list_page(client: "OpenAI", timeout: float, *, after: str) -> RawResponse:
    """Request one page of jobs, newest first; `after` is the last id of the page before, or empty."""
    from openai import omit

    return client.batches.with_raw_response.list(limit=100, timeout=timeout, after=after or omit)
