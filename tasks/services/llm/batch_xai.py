"""Batch jobs by xAI's protocol (docs.x.ai, Batch API): filled in pieces, counted, read in pages."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from tasks.errors import ServiceUnavailable
from tasks.services.llm.batch_protocol import MOST_LISTED, BatchReply, Call, RemoteJob, is_unknown

XAI_PAGE = 1000
XAI_MOST_BYTES = 20_000_000  # of one request that adds rows: 25 MB, with a margin


class XaiBatches:
    """A container with a name of ours: made empty, filled in pieces, read in pages; no status but counters."""

    def __init__(self, call: Call, client: Callable[[], Any]) -> None:
        self.call = call
        self.client = client

    def find(self, mark: str) -> RemoteJob | None:
        """Look through all containers for our name."""
        token = ""
        for _ in range(MOST_LISTED // 100):
            page = self.get("/batches", {"limit": 100, **({"pagination_token": token} if token else {})})
            for batch in page.get("batches") or page.get("data") or []:
                if batch.get("name") == f"likeness-{mark}":
                    return self.describe(batch)
            token = str(page.get("pagination_token") or "")
            if not token:
                break
        return None

    def is_lost(self, job_id: str) -> bool:
        """Ask for the container; only a clear no counts."""
        return is_unknown(lambda: self.client().get(f"/batches/{job_id}", cast_to=object))

    def upload(self, lines: dict[str, bytes], mark: str) -> str:
        """Do nothing: rows are added to the container."""
        return ""

    def create(self, file_id: str, mark: str, *, call: Call) -> RemoteJob:
        """Make the empty container."""
        body = {"name": f"likeness-{mark}"}
        return self.describe(call(lambda client, _: client.post("/batches", body=body, cast_to=object)))

    def fill(self, job: RemoteJob, lines: dict[str, bytes]) -> None:
        """Add the rows that are missing, in pieces. Rows keep their order, so the count says which are there."""
        rows = list(lines.values())
        start = self.look(job.job_id).num_rows
        while start < len(rows):
            end, size = start, 0
            while end < len(rows) and (end == start or size + len(rows[end]) <= XAI_MOST_BYTES):
                size += len(rows[end])
                end += 1
            body = {"batch_requests": [to_xai(json.loads(row)) for row in rows[start:end]]}
            self.call(lambda client, _: client.post(f"/batches/{job.job_id}/requests", body=body, cast_to=object))  # noqa: B023
            counted = self.look(job.job_id).num_rows
            if counted < end:
                raise ServiceUnavailable(f"batch job {job.job_id} has {counted} rows of {end}; run again to go on")
            start = end

    def look(self, job_id: str) -> RemoteJob:
        """Retrieve the counters."""
        return self.describe(self.get(f"/batches/{job_id}", {}))

    def cancel(self, job_id: str) -> None:
        """Cancel what is pending."""
        self.call(lambda client, _: client.post(f"/batches/{job_id}:cancel", cast_to=object))

    def read(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Read page after page."""
        token = ""
        while True:
            query = {"limit": XAI_PAGE, **({"pagination_token": token} if token else {})}
            page = self.get(f"/batches/{job.job_id}/results", query)
            for row in page.get("results") or []:
                yield from_xai(row)
            token = str(page.get("pagination_token") or "")
            if not token:
                return

    def get(self, path: str, query: dict[str, Any]) -> dict[str, Any]:
        """Return what the provider says."""
        page: dict[str, Any] = self.call(
            lambda client, _: client.get(path, cast_to=object, options={"params": query} if query else {})
        )
        return page

    @staticmethod
    def describe(batch: dict[str, Any]) -> RemoteJob:
        """Return counters as a status: an empty or unfinished container is still to be waited for."""
        state = batch.get("state") or {}
        names = ("requests", "pending", "success", "error", "cancelled")
        counts = {name: int(state.get(f"num_{name}") or 0) for name in names}
        reason = str(batch.get("cancel_by_xai_message") or "")
        status = "in_progress" if counts["pending"] or not counts["requests"] else "completed"
        if reason:
            status = "failed"
        elif batch.get("cancel_time") and not counts["pending"]:
            status = "cancelled"
        return RemoteJob(
            job_id=str(batch.get("batch_id") or batch.get("id")),
            status=status,
            num_done=counts["success"] + counts["error"] + counts["cancelled"],
            num_rows=counts["requests"],
            error=reason,
        )


def to_xai(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line of OpenAI's JSONL as a row of xAI's."""
    return {"batch_request_id": row["custom_id"], "batch_request": {"chat_get_completion": row["body"]}}


def from_xai(row: dict[str, Any]) -> tuple[str, BatchReply]:
    """Return the custom id and outcome of one of xAI's results."""
    result = row.get("batch_result") or {}
    response = result.get("response") or {}
    completion = response.get("chat_get_completion")
    if completion is not None:
        return str(row.get("batch_request_id")), BatchReply(completion=completion, error="")
    error = row.get("error_message") or result.get("error") or "no answer"
    message = error.get("message") if isinstance(error, dict) else error
    return str(row.get("batch_request_id")), BatchReply(completion=None, error=str(message))
