"""xAI's Batch API (docs.x.ai): a container that is filled in chunks and read in pages."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tasks.services.llm.batch.provider import (
    MAX_LISTED,
    UNKNOWN,
    BatchReply,
    Call,
    RemoteJob,
    Submission,
    poll_or_lost,
    read_count,
)
from tasks.services.llm.chat.completion import clean_line, name_type, parse_completion, read_error
from tasks.services.llm.errors import EndpointUnavailable

if TYPE_CHECKING:
    from openai import OpenAI

XAI_PAGE = 1000
XAI_MAX_BYTES = 20_000_000  # per request that adds rows; the limit is 25 MB


class XaiBatches:
    """A named container: created empty, filled in chunks, read in pages. It has counters but no status."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def submit(self, lines: Mapping[str, bytes], submission: Submission) -> RemoteJob:
        """Create or find the container, then add the rows that it lacks."""
        job_id = submission.steps.get("job_id", "")
        if not job_id:
            found = self.find(submission.key)
            if found is None:
                submission.reserve()  # before there is anything that could be billed
                found = self.create(submission.key)
            job_id = found.job_id
            submission.save({"job_id": job_id})
        self.add_requests(job_id, lines)
        return self.retrieve(job_id)

    def find(self, key: str) -> RemoteJob | None:
        """Return the container with this key in its name among the first MAX_LISTED, or None."""
        token = ""
        for _ in range(MAX_LISTED // 100):
            page = self.get("/batches", {"limit": 100, **({"pagination_token": token} if token else {})})
            for batch in list_dicts(page.get("batches") or page.get("data")):
                if batch.get("name") == f"likeness-{key}":
                    return describe(batch)
            previous, token = token, read_token(page)
            if not token or token == previous:
                break
        return None

    def create(self, key: str) -> RemoteJob:
        """Create the empty container in one attempt: after a lost response, the next run finds it by its name."""
        body = {"name": f"likeness-{key}"}
        job = describe(self.call(lambda client, _: client.post("/batches", body=body, cast_to=object), max_attempts=1))
        if not job.job_id:
            raise EndpointUnavailable("the provider made a batch job without an id; run again to resume")
        return job

    def add_requests(self, job_id: str, lines: Mapping[str, bytes]) -> None:
        """Add the missing rows in chunks. Lines have a fixed order, so the container's count is the resume index."""
        rows = list(lines.values())
        start = self.retrieve(job_id).num_rows
        while start < len(rows):
            end, size = start, 0
            # At least one row per request: a row over the limit is sent alone, else the loop would not advance.
            while end < len(rows) and (end == start or size + len(rows[end]) <= XAI_MAX_BYTES):
                size += len(rows[end])
                end += 1
            body = {"batch_requests": [to_xai(json.loads(row)) for row in rows[start:end]]}
            counted = self.add_chunk(job_id, body, end)
            if counted < end:
                raise EndpointUnavailable(f"batch job {job_id} has {counted} rows of {end}; run again to resume")
            start = end

    def add_chunk(self, job_id: str, body: Mapping[str, object], end: int) -> int:
        """Add one chunk, after which the container holds `end` rows; return how many it does."""
        attempts = 0

        def post(client: "OpenAI", _: float) -> None:
            nonlocal attempts
            attempts += 1
            # A response may be lost after the rows were added. Posted again, they would be billed twice.
            path = f"/batches/{job_id}"
            if attempts > 1 and describe(client.get(path, cast_to=object)).num_rows >= end:
                return
            client.post(f"{path}/requests", body=body, cast_to=object)

        self.call(post)
        return self.retrieve(job_id).num_rows

    def poll(self, job_id: str) -> RemoteJob:
        """Retrieve the counters."""
        return poll_or_lost(job_id, lambda: self.retrieve(job_id))

    def retrieve(self, job_id: str) -> RemoteJob:
        """Return the counters as a status."""
        return describe(self.get(f"/batches/{job_id}", {}), job_id=job_id)

    def cancel(self, job_id: str) -> None:
        """Cancel the pending rows."""
        self.call(lambda client, _: client.post(f"/batches/{job_id}:cancel", cast_to=object))

    def results(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Yield the rows of all pages; a repeated page token ends them, so that the loop terminates."""
        token, seen = "", set[str]()
        while token not in seen:
            seen.add(token)
            query = {"limit": XAI_PAGE, **({"pagination_token": token} if token else {})}
            page = self.get(f"/batches/{job.job_id}/results", query)
            rows = page.get("results")
            for row in rows if isinstance(rows, list) else []:
                yield from_xai(row)
            token = read_token(page)
            if not token:
                return

    def get(self, path: str, query: dict[str, object]) -> dict[str, object]:
        """Return a JSON object, empty where the response is none."""
        # Untyped requests through the SDK's client: it has no resource class for xAI's protocol.
        page = self.call(lambda client, _: client.get(path, cast_to=object, options={"params": query} if query else {}))
        return page if isinstance(page, dict) else {}


def describe(batch: object, *, job_id: str = "") -> RemoteJob:
    """Return a container as a RemoteJob, with a status derived from its counters."""
    batch = batch if isinstance(batch, dict) else {}
    state = batch.get("state")
    names = ("requests", "pending", "success", "error", "cancelled")
    counts = {name: read_count(state.get(f"num_{name}")) if isinstance(state, dict) else 0 for name in names}
    reason = clean_line(batch.get("cancel_by_xai_message"), limit=200)
    # An empty container has nothing pending either, but is still being filled.
    status = "in_progress" if counts["pending"] or not counts["requests"] else "completed"
    if not isinstance(state, dict):
        status = UNKNOWN
    if reason:  # ended by xAI itself
        status = "failed"
    elif batch.get("cancel_time") and not counts["pending"]:
        status = "cancelled"
    return RemoteJob(
        job_id=job_id or clean_line(batch.get("batch_id") or batch.get("id"), limit=200),
        status=status,
        num_done=counts["success"] + counts["error"] + counts["cancelled"],
        num_rows=counts["requests"],
        error=reason,
    )


def list_dicts(value: object) -> list[dict[str, object]]:
    """Return the objects of a list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def read_token(page: dict[str, object]) -> str:
    """Return the token of the next page, or an empty string."""
    token = page.get("pagination_token")
    return token if isinstance(token, str) else ""


def to_xai(row: dict[str, Any]) -> dict[str, object]:
    """Return a line of OpenAI's JSONL as a row of xAI's."""
    return {"batch_request_id": row["custom_id"], "batch_request": {"chat_get_completion": row["body"]}}


def from_xai(row: object) -> tuple[str, BatchReply]:
    """Return the custom id and outcome of one of xAI's results, whatever its shape."""
    if not isinstance(row, dict):
        return "", BatchReply(None, f"the row is {name_type(row)}", is_billable=True)
    found = row.get("batch_request_id")
    custom_id = found if isinstance(found, str) else ""
    result = row.get("batch_result")
    response = result.get("response") if isinstance(result, dict) else None
    completion = response.get("chat_get_completion") if isinstance(response, dict) else None
    if completion is not None:
        return custom_id, BatchReply(parse_completion(completion))
    error = row.get("error_message") or (result.get("error") if isinstance(result, dict) else None)
    if error:
        return custom_id, BatchReply(None, read_error(error) or "the row failed")
    return custom_id, BatchReply(None, "no answer", is_billable=result is not None)
