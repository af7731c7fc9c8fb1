"""The protocol of tracking servers, and a tracker that discards everything."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MetricRow = tuple[str, float, int]
"""Name, value, step."""
RUN_TAG = "likeness.run"
"""A run has it from its first moment: `Tracker.start` finds by it the run of a call whose answer was lost."""


@dataclass(frozen=True)
class DatasetInfo:
    """An input of a run, identified by its content digest."""

    name: str
    digest: str
    source: str
    """Key prefix of its objects in the store."""
    context: str
    """What it is for, such as training."""


@dataclass(frozen=True)
class LlmCall:
    """One call of an LLM, without its text and images."""

    role: str
    ended_at: float
    """Unix time in seconds."""
    seconds: float
    is_ok: bool
    input_tokens: int
    output_tokens: int
    attributes: dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Version:
    """A registered version of a model, with its tags."""

    version: str
    tags: dict[str, str]


class Tracker(Protocol):
    """The interface of tracking servers."""

    def check(self) -> None:
        """Check within seconds that the server is reachable. Raises ServiceUnavailable or ConfigError."""

    def start(
        self, *, name: str, params: dict[str, str], tags: dict[str, str], started_ms: int | None = None
    ) -> str | None:
        """Open a tracking run and return its id; with RUN_TAG among the tags, a run of that tag is continued."""

    def find_link(self, run_id: str, *, artifact: str = "") -> str:
        """Return the address of a tracking run, or of an artifact, in a UI; empty where no server shows it."""

    def forget(self, *, tag: str, value: str) -> list[str]:
        """Delete what interrupted attempts logged: runs with a tag, their traces and model versions; return run ids."""

    def close_stale(self, *, tag: str, value: str, except_run: str) -> None:
        """Mark runs with a tag as killed that are still marked as running, except the one with that RUN_TAG."""

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the open run."""

    def log_datasets(self, datasets: Sequence[DatasetInfo]) -> None:
        """Log the inputs of the open run."""

    def log_metrics(self, rows: Iterable[MetricRow], *, at_ms: int | None = None) -> None:
        """Log metrics in batches, as of a Unix time in milliseconds; the same rows of the same time are stored once."""

    def log_folder(self, folder: Path, *, path: str) -> None:
        """Log every file of a folder as artifacts below a path."""

    def log_image(self, file: Path, *, key: str, step: int) -> None:
        """Log a PNG image as one of a series over steps."""

    def log_llm_calls(self, calls: Sequence[LlmCall]) -> None:
        """Log calls of LLMs as traces of the open run."""

    def register(self, *, name: str, path: str, description: str, tags: dict[str, str]) -> str | None:
        """Register the artifacts below a path as a new version of a model; return its version."""

    def has_artifacts(self, run_id: str, paths: Sequence[str]) -> bool:
        """Whether a tracking run is there and has artifacts below each path."""

    def has_version(self, name: str, version: str) -> bool:
        """Whether the registry has a version of a model."""

    def find_alias(self, name: str, alias: str) -> "Version | None":
        """Return the model version that an alias names; None where there is none."""

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Move an alias to a version of a model."""

    def remove_alias(self, name: str, alias: str) -> None:
        """Remove an alias of a model, if there is one."""

    def finish(self, *, is_failed: bool) -> None:
        """Close the tracking run."""


class NoTracker:
    """Discards everything."""

    def check(self) -> None:
        """There is no server."""

    def start(
        self, *, name: str, params: dict[str, str], tags: dict[str, str], started_ms: int | None = None
    ) -> str | None:
        """There is no run."""
        return None

    def find_link(self, run_id: str, *, artifact: str = "") -> str:
        """There is no UI."""
        return ""

    def forget(self, *, tag: str, value: str) -> list[str]:
        """Nothing is kept."""
        return []

    def close_stale(self, *, tag: str, value: str, except_run: str) -> None:
        """Nothing is kept."""

    def set_tag(self, name: str, value: str) -> None:
        """Nothing is kept."""

    def log_datasets(self, datasets: Sequence[DatasetInfo]) -> None:
        """Nothing is kept."""

    def log_metrics(self, rows: Iterable[MetricRow], *, at_ms: int | None = None) -> None:
        """Nothing is kept."""

    def log_folder(self, folder: Path, *, path: str) -> None:
        """Nothing is kept."""

    def log_image(self, file: Path, *, key: str, step: int) -> None:
        """Nothing is kept."""

    def log_llm_calls(self, calls: Sequence[LlmCall]) -> None:
        """Nothing is kept."""

    def register(self, *, name: str, path: str, description: str, tags: dict[str, str]) -> str | None:
        """There is no registry."""
        return None

    def has_artifacts(self, run_id: str, paths: Sequence[str]) -> bool:
        """Nothing is stored, so nothing can be missing."""
        return True

    def has_version(self, name: str, version: str) -> bool:
        """There is no registry."""
        return True

    def find_alias(self, name: str, alias: str) -> "Version | None":
        """There is no registry."""
        return None

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """There is no registry."""

    def remove_alias(self, name: str, alias: str) -> None:
        """There is no registry."""

    def finish(self, *, is_failed: bool) -> None:
        """There is no run."""
