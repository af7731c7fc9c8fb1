"""What a batch job is to us, whoever runs it; what survives a crash is decided by the caller."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.services.llm.chat.completion import (
    ChatCompletion,
    clean_line,
    is_finite,
    name_type,
    parse_completion,
    read_error,
)
from tasks.services.llm.chat.transport import parse_body

ENDPOINT = "/v1/chat/completions"
TERMINAL = ("completed", "failed", "expired", "cancelled")
STATUSES = (*TERMINAL, "validating", "in_progress", "finalizing", "cancelling")
UNKNOWN = "unknown"
MOST_LISTED = 2_000

Call = Callable[[Callable[[Any, float], Any]], Any]
"""Runs something with a client and a timeout, with retries and our errors."""


@dataclass(frozen=True)
class BatchReply:
    """The outcome of one row: a completion, or the reason there is none."""

    completion: ChatCompletion | None
    error: str = ""
    is_billable: bool = False
    """Whether a row without a completion may have been paid for: it was answered, and can't be read."""


@dataclass(frozen=True)
class RemoteJob:
    """A job as its provider sees it."""

    job_id: str
    status: str
    """One of STATUSES, or UNKNOWN."""
    num_done: int = 0
    num_rows: int = 0
    file_id: str = ""
    error: str = ""
    """Why it failed as a whole."""
    is_over_limit: bool = False
    """Whether it failed because too many tokens were enqueued."""
    output_files: tuple[str, ...] = ()


class BatchProvider(Protocol):
    """One way of running a batch job. Every call may be made again after a doubt."""

    def find(self, idempotency_key: str) -> RemoteJob | None:
        """Return the job that carries our idempotency_key."""

    def is_lost(self, job_id: str) -> bool:
        """Whether the provider no longer knows a job."""

    def upload(self, lines: dict[str, bytes], idempotency_key: str) -> str:
        """Send the rows ahead, where the provider wants a file, and return its id."""

    def create(self, file_id: str, idempotency_key: str, *, call: Call) -> RemoteJob:
        """Create the job, in one attempt."""

    def add_requests(self, job: RemoteJob, lines: dict[str, bytes]) -> None:
        """Add the rows that the job doesn't have yet, where rows are not sent ahead."""

    def retrieve(self, job_id: str) -> RemoteJob:
        """Return how far a job is."""

    def cancel(self, job_id: str) -> None:
        """Ask the provider to leave off; what it has answered stays."""

    def read(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Yield custom ids and outcomes of an ended job."""


def is_unknown(ask: Callable[[], Any]) -> bool:
    """Whether a provider says clearly that it doesn't know something."""
    import openai

    try:
        ask()
    except openai.NotFoundError:
        return True
    except (openai.OpenAIError, ValueError, RecursionError):
        return False
    return False


def read_response(response: Any) -> Any:
    """Return the JSON of one of the SDK's raw responses. Raises EndpointUnavailable for anything else."""
    return parse_body(response.content)


def read_count(value: Any) -> int:
    """Return a counter; what is none counts as 0."""
    return int(value) if is_finite(value) and value >= 0 else 0


def read_lines(data: bytes) -> Iterator[tuple[str, BatchReply]]:
    """Yield custom ids and outcomes of an output or error file."""
    # Not splitlines: it would also cut at line separators inside a reply's text.
    for line in data.split(b"\n"):
        if line.strip():
            yield read_row(line)


def read_row(line: bytes) -> tuple[str, BatchReply]:
    """Parse one line of an output or error file; without a custom id it belongs to no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "", BatchReply(None, "unreadable line", is_billable=True)
    return parse_row(row)


def parse_row(row: Any) -> tuple[str, BatchReply]:
    """Return one row's custom id and outcome, whatever its shape."""
    if not isinstance(row, dict):
        return "", BatchReply(None, f"the row is {name_type(row)}", is_billable=True)
    custom_id = row["custom_id"] if isinstance(row.get("custom_id"), str) else ""
    error, response = row.get("error"), row.get("response")
    if error is not None:
        return custom_id, BatchReply(None, read_error(error) or "the row failed")
    if not isinstance(response, dict):
        return custom_id, BatchReply(None, f"the row's response is {name_type(response)}", is_billable=True)
    status, body = response.get("status_code"), response.get("body")
    if status == 200:
        return custom_id, BatchReply(parse_completion(body))
    detail = body.get("error") if isinstance(body, dict) else body
    reason = read_error(detail) if detail else ""
    return custom_id, BatchReply(None, reason or clean_line(f"status {status}", limit=60))
