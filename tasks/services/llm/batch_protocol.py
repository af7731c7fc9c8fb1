"""What a batch job is to us, whoever runs it; what survives a crash is decided by the caller."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

ENDPOINT = "/v1/chat/completions"
TERMINAL = ("completed", "failed", "expired", "cancelled")
MOST_LISTED = 2_000

Call = Callable[[Callable[[Any, float], Any]], Any]
"""Runs something with a client and a timeout, with retries and our errors."""


class BatchReply(BaseModel):
    """The outcome of one row: a completion, or the reason there is none."""

    completion: dict[str, Any] | None
    error: str


@dataclass(frozen=True)
class RemoteJob:
    """A job as its provider sees it."""

    job_id: str
    status: str
    num_done: int = 0
    num_rows: int = 0
    file_id: str = ""
    error: str = ""
    """Why it failed as a whole."""
    output_files: tuple[str, ...] = ()


class BatchProvider(Protocol):
    """One way of running a batch job. Every call may be made again after a doubt."""

    def find(self, mark: str) -> RemoteJob | None:
        """Return the job that carries our mark."""

    def is_lost(self, job_id: str) -> bool:
        """Whether the provider no longer knows a job."""

    def upload(self, lines: dict[str, bytes], mark: str) -> str:
        """Send the rows ahead, where the provider wants a file, and return its id."""

    def create(self, file_id: str, mark: str, *, call: Call) -> RemoteJob:
        """Create the job, in one attempt."""

    def fill(self, job: RemoteJob, lines: dict[str, bytes]) -> None:
        """Add the rows that the job doesn't have yet, where rows are not sent ahead."""

    def look(self, job_id: str) -> RemoteJob:
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
    except openai.OpenAIError:
        return False
    return False


def read_lines(data: bytes) -> Iterator[tuple[str, BatchReply]]:
    """Yield custom ids and outcomes of an output or error file."""
    # Not splitlines: it would also cut at line separators inside a reply's text.
    for line in data.split(b"\n"):
        if line.strip():
            yield read_row(line)


def read_row(line: bytes) -> tuple[str, BatchReply]:
    """Sort one line of an output or error file: its custom id and outcome."""
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return "", BatchReply(completion=None, error="unreadable line")
    response = row.get("response") or {}
    custom_id = str(row.get("custom_id"))
    if row.get("error") is None and response.get("status_code") == 200:
        return custom_id, BatchReply(completion=response.get("body"), error="")
    detail = row.get("error") or (response.get("body") or {}).get("error") or {}
    message = detail.get("message") if isinstance(detail, dict) else str(detail)
    return custom_id, BatchReply(completion=None, error=str(message or f"status {response.get('status_code')}"))
