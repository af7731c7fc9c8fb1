"""The protocol of batch providers, and their responses as common types."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from tasks.services.llm.chat.completion import (
    ChatCompletion,
    clean_line,
    is_finite,
    name_type,
    parse_completion,
    read_error,
)
from tasks.services.llm.chat.transport import parse_body
from tasks.services.llm.errors import RequestRefused

if TYPE_CHECKING:
    from openai import OpenAI

R = TypeVar("R")
ENDPOINT: Final = "/v1/chat/completions"
TERMINAL = ("completed", "failed", "expired", "cancelled")
STATUSES = (*TERMINAL, "validating", "in_progress", "finalizing", "cancelling")
UNKNOWN = "unknown"
LOST = "lost"
"""The provider reports no such job."""
MAX_LISTED = 2_000  # jobs that are listed to find one by its idempotency key


class Call(Protocol):
    """Runs a function of (client, timeout in seconds) with retries and mapped errors."""

    def __call__(self, ask: Callable[["OpenAI", float], R], *, max_attempts: int = 0) -> R:
        """Return what `ask` returns; 0 attempts mean as many as the profile allows."""


class RawResponse(Protocol):
    """A response of the SDK that is not parsed by it."""

    @property
    def content(self) -> bytes:
        """The body."""


@dataclass(frozen=True)
class BatchReply:
    """The outcome of one row: a completion, or the reason there is none."""

    completion: ChatCompletion | None
    error: str = ""
    is_billable: bool = False
    """Whether a row without a completion may have been paid for: it was answered, and can't be read."""


@dataclass(frozen=True)
class RemoteJob:
    """A job as its provider reports it."""

    job_id: str
    status: str
    """One of STATUSES, UNKNOWN or LOST."""
    num_done: int = 0
    num_rows: int = 0
    error: str = ""
    """Why it failed as a whole."""
    is_over_limit: bool = False
    """Whether it failed because too many tokens were enqueued."""
    output_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submission:
    """A job being submitted, with the steps that are persisted so that a killed process can resume between them."""

    key: str
    """The idempotency key, by which the provider's job is found again."""
    steps: Mapping[str, str]
    """What an earlier attempt saved; private to the provider."""
    save: Callable[[Mapping[str, str]], None]
    """Persists steps."""
    reserve: Callable[[], None]
    """Reserves the worst-case cost; to be called before the job is created. Raises BudgetExceeded."""


class BatchProvider(Protocol):
    """A batch API."""

    def submit(self, lines: Mapping[str, bytes], submission: Submission) -> RemoteJob:
        """Return the job of these rows, JSONL by custom id: an existing one of this key, else a new one.

        May be called again after any failure; creates one job per key.
        """

    def find(self, key: str) -> RemoteJob | None:
        """Return the job with this idempotency key; None where the provider has none."""

    def poll(self, job_id: str) -> RemoteJob:
        """Return a job's status and counters; LOST where the provider does not know it."""

    def results(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Yield custom ids and outcomes of an ended job, in any order; an empty id belongs to no row."""

    def cancel(self, job_id: str) -> None:
        """Request cancellation; finished rows remain available and billed."""


def poll_or_lost(job_id: str, retrieve: Callable[[], RemoteJob]) -> RemoteJob:
    """Return a job, or a LOST one where the provider answers 404."""
    try:
        return retrieve()
    except RequestRefused as error:
        if error.status != 404:
            raise
        return RemoteJob(job_id, LOST)


def read_response(response: RawResponse) -> object:
    """Return the JSON of one of the SDK's raw responses. Raises EndpointUnavailable for anything else."""
    # The SDK builds its models without validation, so an odd shape would surface later, as an AttributeError.
    return parse_body(response.content)


def read_count(value: object) -> int:
    """Return a counter; anything but a non-negative number counts as 0."""
    return int(value) if is_finite(value) and value >= 0 else 0


def read_lines(data: bytes) -> Iterator[tuple[str, BatchReply]]:
    """Yield custom ids and outcomes of an output or error file."""
    # Not str.splitlines, which also splits at U+2028 and the like inside a reply's text.
    for line in data.split(b"\n"):
        if line.strip():
            yield read_row(line)


def read_row(line: bytes) -> tuple[str, BatchReply]:
    """Parse one line of an output or error file."""
    # An unreadable line may hold a paid reply, hence `is_billable`.
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "", BatchReply(None, "unreadable line", is_billable=True)
    return parse_row(row)


def parse_row(row: object) -> tuple[str, BatchReply]:
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
    # Rows with an error or another status are not billed; an unreadable response may be.
    if status == 200:
        return custom_id, BatchReply(parse_completion(body))
    detail = body.get("error") if isinstance(body, dict) else body
    reason = read_error(detail) if detail else ""
    return custom_id, BatchReply(None, reason or clean_line(f"status {status}", limit=60))
