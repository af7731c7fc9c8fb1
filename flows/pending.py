"""Runs that wait for a batch job: suspended ones, and interrupted ones whose job is still alive."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.request import RunRequest
from conf.schema import RunConfig
from tasks.errors import ConfigError, LikenessError
from tasks.stage.digests import load_lines

JOB_LOG = "jobs.jsonl"
INTERRUPTED = ("failed", "cancelled", "")
"""Statuses of runs that may have left a job behind; without a summary the process was killed."""


@dataclass
class PendingReport:
    """What came of resuming pending runs, by run folder names."""

    finished: list[dict[str, Any]] = field(default_factory=list)
    """Summaries."""
    waiting: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: all are done; 11: some still wait; 1: some failed."""
        if self.failed:
            return 1
        return 11 if self.waiting else 0


def list_pending(output: Path) -> list[list[Path]]:
    """Return the folders of pending runs, oldest first; those that asked for the same are one job."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(output.glob("*/request.json"), key=lambda path: path.parent.name):
        folder = path.parent
        status = read_status(folder)
        if status == "pending" or (status in INTERRUPTED and has_live_job(folder)):
            groups.setdefault(path.read_text(errors="replace"), []).append(folder)
    return list(groups.values())


def read_status(folder: Path) -> str:
    """Return a run's status; nothing where it left no summary, or a torn one."""
    return str(read_summary(folder).get("status") or "")


def read_summary(folder: Path) -> dict[str, Any]:
    """Return a run's summary; an empty one where it is missing or can't be read."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def read_request(folder: Path) -> RunRequest:
    """Return what a run was asked for. Raises ConfigError for a damaged file."""
    try:
        return RunRequest.model_validate_json((folder / "request.json").read_bytes())
    except ValueError as error:
        raise ConfigError(f"{folder / 'request.json'} can't be read; start the run anew") from error


def find_readable(groups: list[list[Path]]) -> Path:
    """Return the first run whose request can be read; else the first, whose error says so."""
    for folders in groups:
        try:
            read_request(folders[0])
        except ConfigError:
            continue
        return folders[0]
    return groups[0][0]


def list_job_keys(folder: Path) -> list[str]:
    """Return the store keys of the batch jobs that a run made or waited for, each once."""
    path = folder / JOB_LOG
    rows = load_lines(path.read_bytes()) if path.is_file() else iter(())
    keys = [row.get("state_key") for row in rows if row is not None]
    return list(dict.fromkeys(key for key in keys if isinstance(key, str)))


def has_live_job(folder: Path) -> bool:
    """Whether a run made a batch job that nobody has harvested, and that no running process attends."""
    from tasks.services.llm.batch_job import find_state
    from tasks.services.llm.lease import find_holder
    from tasks.services.store import open_store

    keys = list_job_keys(folder)
    if not keys:
        return False
    try:
        store = open_store(read_config(folder).store)
        states = [state for key in keys if (state := find_state(store, key)) is not None]
    except (LikenessError, OSError, ValueError):  # a store that is gone holds no job
        return False
    live = [state for state in states if not state.is_harvested]
    holders = [find_holder(store, state.file_name.removesuffix(".json")) for state in live]
    return bool(live) and not any(holder and not holder[1].is_stale() for holder in holders)


def read_config(folder: Path) -> RunConfig:
    """Return a run's configuration, with its store where the folder is now."""
    config = RunConfig.model_validate_json((folder / "config.json").read_bytes())
    if config.store.folder == f"{config.output_dir}/store":
        moved = config.store.model_copy(update={"folder": str(folder.parent / "store")})
        config = config.model_copy(update={"store": moved, "output_dir": str(folder.parent)})
    return config
