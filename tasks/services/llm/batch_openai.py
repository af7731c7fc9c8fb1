"""Batch jobs by OpenAI's protocol: files in, files out (platform.openai.com/docs/api-reference/batch)."""

import io
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from tasks.services.llm.batch_protocol import ENDPOINT, MOST_LISTED, BatchReply, Call, RemoteJob, is_unknown, read_lines


class OpenAiBatches:
    """A job of one file, found again by its metadata."""

    def __init__(self, call: Call, client: Callable[[], Any]) -> None:
        self.call = call
        self.client = client

    def find(self, mark: str) -> RemoteJob | None:
        """Look through the newest jobs for our metadata."""
        batches = self.call(lambda client, timeout: client.batches.list(limit=100, timeout=timeout))
        for batch in islice(batches, MOST_LISTED):
            if (batch.metadata or {}).get("likeness_input") == mark:
                return self.describe(batch)
        return None

    def is_lost(self, job_id: str) -> bool:
        """Ask for the job; only a clear no counts."""
        return is_unknown(lambda: self.client().batches.retrieve(job_id, timeout=30))

    def upload(self, lines: dict[str, bytes], mark: str) -> str:
        """Upload one JSONL file."""
        data, name = b"".join(lines.values()), f"likeness-{mark[:24]}.jsonl"
        upload = self.call(
            lambda client, timeout: client.files.create(file=(name, io.BytesIO(data)), purpose="batch", timeout=timeout)
        )
        return str(upload.id)

    def create(self, file_id: str, mark: str, *, call: Call) -> RemoteJob:
        """Create the job of a file."""
        return self.describe(
            call(
                lambda client, timeout: client.batches.create(
                    input_file_id=file_id,
                    endpoint=ENDPOINT,
                    completion_window="24h",
                    metadata={"likeness_input": mark},
                    timeout=timeout,
                )
            )
        )

    def fill(self, job: RemoteJob, lines: dict[str, bytes]) -> None:
        """Do nothing: the file had all rows."""

    def look(self, job_id: str) -> RemoteJob:
        """Retrieve the job."""
        return self.describe(self.call(lambda client, timeout: client.batches.retrieve(job_id, timeout=timeout)))

    def cancel(self, job_id: str) -> None:
        """Cancel the job; it may take minutes until it says so."""
        self.call(lambda client, timeout: client.batches.cancel(job_id, timeout=timeout))

    def read(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Read output and error file alike."""
        for file_id in job.output_files:
            content = self.call(lambda client, timeout: client.files.content(file_id, timeout=timeout))  # noqa: B023
            yield from read_lines(content.content)

    @staticmethod
    def describe(batch: Any) -> RemoteJob:
        """Return the SDK's object as ours."""
        counts, errors = batch.request_counts, getattr(batch.errors, "data", None)
        return RemoteJob(
            job_id=batch.id,
            status=batch.status,
            num_done=counts.completed + counts.failed if counts else 0,
            num_rows=counts.total if counts else 0,
            file_id=batch.input_file_id,
            error=errors[0].message if errors else "",
            output_files=tuple(filter(None, (batch.output_file_id, batch.error_file_id))),
        )
