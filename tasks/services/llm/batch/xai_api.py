"""Batch jobs by xAI's protocol (docs.x.ai, Batch API): filled in pieces, counted, read in pages."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.services.llm.batch.provider import (
    MOST_LISTED,
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

XAI_PAGE = 1000
XAI_MOST_BYTES = 20_000_000  # of one request that adds rows: 25 MB, with a margin


class XaiBatches:
    """A container with a name of ours: created empty, filled in pieces, read in pages; no status but counters."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def submit(self, lines: Mapping[str, bytes], submission: Submission) -> RemoteJob:
        """Create the container, then add the rows that it lacks."""
        job_id = submission.steps.get("job_id", "")
        if not job_id:
            found = self.find(submission.key)
            if found is None:
                submission.reserve()
                found = self.create(submission.key)
            job_id = found.job_id
            submission.save({"job_id": job_id})
        self.add_requests(job_id, lines)
        return self.retrieve(job_id)

    def find(self, key: str) -> RemoteJob | None:
        """Look through all containers for our name."""
        token = ""
        for _ in range(MOST_LISTED // 100):
            page = self.get("/batches", {"limit": 100, **({"pagination_token": token} if token else {})})
            for batch in list_dicts(page.get("batches") or page.get("data")):
                if batch.get("name") == f"likeness-{key}":
                    return describe(batch)
            previous, token = token, read_token(page)
            if not token or token == previous:
                break
        return None

    def create(self, key: str) -> RemoteJob:
        """Create the empty container, in one attempt: after an unclear answer the next run looks for its name."""
        body = {"name": f"likeness-{key}"}
        job = describe(self.call(lambda client, _: client.post("/batches", body=body, cast_to=object), max_attempts=1))
        if not job.job_id:
            raise EndpointUnavailable("the provider made a batch job without an id; run again to resume")
        return job

    def add_requests(self, job_id: str, lines: Mapping[str, bytes]) -> None:
        """Add the missing rows, in pieces. Rows keep their order, so the count tells which are there."""
        rows = list(lines.values())
        start = self.retrieve(job_id).num_rows
        while start < len(rows):
            end, size = start, 0
            while end < len(rows) and (end == start or size + len(rows[end]) <= XAI_MOST_BYTES):
                size += len(rows[end])
                end += 1
            body = {"batch_requests": [to_xai(json.loads(row)) for row in rows[start:end]]}
            self.call(lambda client, _: client.post(f"/batches/{job_id}/requests", body=body, cast_to=object))  # noqa: B023
            counted = self.retrieve(job_id).num_rows
            if counted < end:
                raise EndpointUnavailable(f"batch job {job_id} has {counted} rows of {end}; run again to resume")
            start = end

    def poll(self, job_id: str) -> RemoteJob:
        """Retrieve the counters."""
        return poll_or_lost(job_id, lambda: self.retrieve(job_id))

    def retrieve(self, job_id: str) -> RemoteJob:
        """Return the counters as a status."""
        return describe(self.get(f"/batches/{job_id}", {}), job_id=job_id)

    def cancel(self, job_id: str) -> None:
        """Cancel what is pending."""
        self.call(lambda client, _: client.post(f"/batches/{job_id}:cancel", cast_to=object))

    def results(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Read page after page; a provider that repeats one has no more."""
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
        """Return what the provider says; nothing where it is no object."""
        page = self.call(lambda client, _: client.get(path, cast_to=object, options={"params": query} if query else {}))
        return page if isinstance(page, dict) else {}


def describe(batch: object, *, job_id: str = "") -> RemoteJob:
    """Return counters as a status: an empty or unfinished container is still to be waited for."""
    batch = batch if isinstance(batch, dict) else {}
    state = batch.get("state")
    names = ("requests", "pending", "success", "error", "cancelled")
    counts = {name: read_count(state.get(f"num_{name}")) if isinstance(state, dict) else 0 for name in names}
    reason = clean_line(batch.get("cancel_by_xai_message"), limit=200)
    status = "in_progress" if counts["pending"] or not counts["requests"] else "completed"
    if not isinstance(state, dict):
        status = UNKNOWN
    if reason:
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
    """Return where the next page begins, or nothing."""
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
