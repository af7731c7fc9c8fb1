"""`likeness jobs`: list, show, adopt, cancel and discard batch jobs, with what they cost so far."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.console import make_cell, show_usd
from flows.runs.pending import list_job_keys
from flows.runs.records import list_run_folders, read_run
from tasks.errors import ConfigError, LikenessError
from tasks.stage.cache import PREFIXES

if TYPE_CHECKING:
    from tasks.services.llm.batch.admin import JobHandle
    from tasks.services.llm.batch.job import BatchState

ACTIONS = ("list", "show", "adopt", "cancel", "discard")


@dataclass(frozen=True)
class FoundJob:
    """A job in a store, and the run whose configuration reaches it."""

    folder: Path
    key: str
    state: "BatchState"
    run_ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """The provider's id, or the state's own name before there is one."""
        return self.state.batch_id or self.state.file_name.removesuffix(".json")


def run_jobs_command(output: Path, action: str, job_id: str, *, profile: str) -> int:
    """Run one action and return the exit code."""
    jobs = find_jobs(output)
    if action == "list":
        print_jobs(jobs, output)
        return 0
    if not job_id:
        raise ConfigError(f"`likeness jobs {action}` needs a job id; `likeness jobs list` shows them")
    matches = [job for job in jobs if job.name == job_id]
    with open_job(output, matches[0] if matches else None, job_id=job_id, profile=profile) as handle:
        return act(handle, action)


def act(handle: "JobHandle", action: str) -> int:
    """Run one action on one job."""
    from tasks.services.llm.batch import admin as batch_admin

    state = handle.state
    if action == "show":
        remote = batch_admin.retrieve(handle)
        print(f"{handle.job_id}: {remote.status}, {remote.num_done} of {remote.num_rows or len(state.custom_ids)} rows")
        print(f"profile {state.profile}, role {state.role or '-'}, cost {show_cost(state)}")
        if remote.error:
            print(f"provider error: {remote.error}")
    elif action == "cancel":
        batch_admin.cancel(handle)
        print(f"{handle.job_id}: cancelled; the next run uses its finished replies and sends the rest as calls")
    elif action == "discard":
        reserved = batch_admin.discard(handle)
        print(f"{handle.job_id}: discarded; its rows are sent again, {show_usd(reserved)} USD remain reserved for it")
    else:
        count, spent = batch_admin.adopt(handle)
        cost = "unknown cost" if spent is None else f"{show_usd(spent)} USD"
        print(f"{handle.job_id}: {count} replies cached, {cost}; runs with the same requests reuse them")
    return 0


def find_jobs(output: Path) -> list[FoundJob]:
    """Return the batch jobs in the stores of all runs in a folder, newest first."""
    from tasks.services.llm.batch.job import find_state
    from tasks.services.store.open import open_store

    found: dict[tuple[str, str], FoundJob] = {}
    runs = list_run_folders(output)[::-1]
    uses = {folder: list_job_keys(folder) for folder in runs}
    seen: set[str] = set()
    for folder in runs:
        try:
            store_config = read_run(folder).config.store
            # Most runs share one store, which is listed once.
            if (name := store_config.model_dump_json()) in seen:
                continue
            seen.add(name)
            store = open_store(store_config)
        except ConfigError:  # of another version of likeness, or damaged
            continue
        except LikenessError as error:
            print(f"jobs of {folder.name} can't be listed: {error}", file=sys.stderr)
            continue
        keys = [key for stage in ("subject", "scoring") for key in store.list_keys(f"{PREFIXES[stage]}/")]
        for key in keys:
            if "/batches/" in key and key.endswith(".json") and (state := find_state(store, key)) is not None:
                users = tuple(run.name for run in runs if key in uses[run])
                # The newest run that used the job: its configuration has the job's profile and prices.
                own = next((run for run in runs if run.name in users), folder)
                found[name, key] = FoundJob(own, key, state, users)
    return sorted(found.values(), key=lambda job: -job.state.created_at)


@contextmanager
def open_job(output: Path, job: FoundJob | None, *, job_id: str, profile: str) -> Iterator["JobHandle"]:
    """Open the services of a job's run. Raises ConfigError where the job is unknown."""
    from flows.runs.context import open_budget
    from tasks.mini.vision_server.launch import LocalServer
    from tasks.services.llm.batch.admin import JobHandle
    from tasks.services.llm.batch.job import BatchState
    from tasks.services.llm.budget.ledger import Ledger
    from tasks.services.llm.service import LlmService, LocalServices
    from tasks.services.store.open import open_store

    folder = job.folder if job else newest_with(output, profile, job_id)
    config = read_run(folder).config
    state = job.state if job else BatchState(
        input_sha256="", attempt=0, custom_ids=(), profile=profile, batch_id=job_id
    )  # fmt: skip
    server = LocalServer(output / "jobs-vision-server.log")
    llm = LlmService(
        config.llm,
        store=open_store(config.store),
        ledger=Ledger(folder / "ledger.jsonl"),
        budget=open_budget(config, output.absolute()),
        local=LocalServices(start_server=server.start, batch_folder=output.absolute() / "work" / "batches"),
    )
    try:
        yield JobHandle(llm, state, job.key if job else "")
    finally:
        llm.close()
        server.stop()


def newest_with(output: Path, profile: str, job_id: str) -> Path:
    """Return the newest run whose configuration has a profile. Raises ConfigError where none has."""
    if not profile:
        raise ConfigError(f"no run in {output} created job {job_id}; to adopt it, name its LLM profile with --profile")
    for folder in reversed(list_run_folders(output)):
        if profile in read_run(folder).config.llm.profiles:
            return folder
    raise ConfigError(f"no run in {output} has the LLM profile {profile!r}")


def print_jobs(jobs: list[FoundJob], output: Path) -> None:
    """Print a table of jobs."""
    from rich.console import Console
    from rich.table import Table

    if not jobs:
        print(f"no batch jobs in {output}")
        return
    table = Table(box=None, header_style="bold")
    for title in ("job", "profile", "role", "status", "rows", "created", "cost so far", "runs"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        state = job.state
        created = time.strftime("%Y-%m-%d %H:%M", time.gmtime(state.created_at)) if state.created_at else "-"
        status = state.status + (", cancelled" if state.is_cancelled and state.status != "cancelled" else "")
        status += ", collected" if state.is_collected else ""
        cells = (job.name, state.profile, state.role, status, str(len(state.custom_ids)), created, show_cost(state))
        table.add_row(*map(make_cell, (*cells, ", ".join(job.run_ids) or "-")))
    Console(width=200).print(table)


def show_cost(state: "BatchState") -> str:
    """Return what a job cost, or how much is reserved for it."""
    if state.is_collected:
        return "unknown" if state.spent_usd is None else f"{state.spent_usd:.4f} USD"
    return f"at most {state.reserved_usd:.4f} USD" if state.reservation else "-"
