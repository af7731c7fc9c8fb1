"""Collects what a campaign left: states, weights, ledgers, slots, processes and files."""

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.runs.records import list_run_folders, read_summary
from tasks.errors import ArtifactCorrupt
from tasks.manifests.training import TunedModel
from tasks.services.llm.budget.ledger import read_rows
from tasks.services.store.base import Store
from tasks.services.tracking.mlflow_files import UNFINISHED
from tasks.stage.digests import load_signed
from tasks.stage.files import PART_PREFIX
from tasks.stage.states import SLOT_LEASE_SECONDS
from tests.chaos.invariants import Account, Answer
from tests.chaos.processes import list_processes
from tests.chaos.site import Place, Site
from tests.support import prefect_api

UNPAID = ("cached", "cancelled", "ServiceUnavailable")
"""Outcomes of ledger rows of attempts that brought no reply."""


@dataclass
class Submitted:
    """A run of the campaign."""

    name: str
    place: Place
    seed: int
    flow_run_id: str
    resume_codes: list[int] = field(default_factory=list)
    resumed_at: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each `likeness resume` that succeeded."""


@dataclass(frozen=True)
class Change:
    """One state of a flow run."""

    at: float
    type: str


def read_flow_run(site: Site, flow_run_id: str) -> dict[str, Any]:
    """Return a flow run as the server knows it."""
    with site.api() as client:
        return prefect_api.read_flow_run(client, flow_run_id)


def read_history(site: Site, flow_run_id: str) -> list[Change]:
    """Return a flow run's states, oldest first."""
    with site.api() as client:
        states = prefect_api.read_states(client, flow_run_id)
    return [Change(datetime.fromisoformat(state["timestamp"]).timestamp(), state["type"]) for state in states]


def find_run_folders(run: Submitted) -> list[Path]:
    """Return the folders of a run's attempts in a deployment, oldest first."""
    folders = list_run_folders(run.place.folder)
    return [folder for folder in folders if read_summary(folder).flow_run_id == run.flow_run_id]


def list_finished(run: Submitted) -> tuple[tuple[float, float], ...]:
    """Return begin and end of each attempt of a flow run that finished."""
    found = []
    for folder in find_run_folders(run):
        summary = read_summary(folder)
        if summary.status == "finished":
            ended = (folder / "summary.json").stat().st_mtime
            found.append((ended - (summary.wall_seconds or 0.0), ended))
    return tuple(found)


def read_weights(store: Store, run: Submitted) -> dict[str, str]:
    """Return the SHA-256 of the bytes of each weights file of a run; none where no attempt finished."""
    for folder in reversed(list_run_folders(run.place.folder)):
        summary = read_summary(folder)
        seed = json.loads((folder / "config.json").read_text())["seed"]
        if summary.status != "finished" or seed != run.seed:
            continue
        prefix = f"03-training/{summary.stages['training'].key}/"
        data = store.find_bytes(f"{prefix}manifest.json")
        try:
            manifest = load_signed(TunedModel, data or b"")
        except ArtifactCorrupt:
            return {}
        keys = [ref.key for ref in manifest.model if ref.key.endswith(".safetensors")]
        return {key.removeprefix(prefix): hashlib.sha256(store.find_bytes(key) or b"").hexdigest() for key in keys}
    return {}


def count_paid(place: Place) -> Counter[str]:
    """Return the paid calls in all ledgers of a place, by role."""
    counts: Counter[str] = Counter()
    for path in place.folder.glob("*/ledger.jsonl"):
        for row in read_rows(path):
            if row is not None and row.outcome not in UNPAID:
                counts[row.role] += 1
    return counts


def read_account(place: Place, undisturbed: Place) -> Account:
    """Return what an LLM was asked in a place, beside the undisturbed one."""
    return Account(
        name=place.name,
        answers=list_answers(place),
        expected=Counter(answer.sha256 for answer in list_answers(undisturbed)),
        paid=count_paid(place),
        expected_paid=count_paid(undisturbed),
    )


def list_answers(place: Place) -> tuple[Answer, ...]:
    """Return the answers that the proxy of a place's vision server delivered."""
    delivered = place.llm.delivered if place.llm else ()
    return tuple(Answer(each.sha256, each.at) for each in delivered if each.path.endswith("/chat/completions"))


def read_active_slots(site: Site) -> Mapping[str, int]:
    """Return the slots in use of every concurrency limit, after those of killed processes had time to come back."""
    deadline = time.monotonic() + 2 * SLOT_LEASE_SECONDS
    while True:
        with site.api() as client:
            limits = client.post("/v2/concurrency_limits/filter", json={}).raise_for_status().json()
        slots = {limit["name"]: int(limit["active_slots"]) for limit in limits}
        if not any(slots.values()) or time.monotonic() > deadline:
            return slots
        time.sleep(2)


def list_orphans(site: Site) -> tuple[str, ...]:
    """Return the command lines of all processes of the campaign that still run."""
    return tuple(each.command[:200] for each in list_processes(site.token))


def list_temporary_files(site: Site) -> tuple[str, ...]:
    """Return temporary files in the output folders, in the bucket and in the folder of temporary files."""
    found = [path.relative_to(site.root).as_posix() for path in site.root.rglob(f"{PART_PREFIX}*")]
    found += [path.relative_to(site.root).as_posix() for path in (site.root / "tmp").glob("likeness-*")]
    found += [path.relative_to(site.root).as_posix() for path in site.root.rglob(f"{UNFINISHED}*")]
    for place in site.places.values():
        if place.kind == "s3":
            with contextlib.suppress(OSError):
                keys = site.open_store(place).list_keys("")
                found += [f"{place.name}:{key}" for key in keys if PART_PREFIX in key]
    return tuple(sorted(found))


def find_active(site: Site, runs: Sequence[Submitted]) -> tuple[str, ...]:
    """Return the flow runs that are in progress."""
    states = {run.flow_run_id: read_flow_run(site, run.flow_run_id)["state_type"] for run in runs}
    return tuple(flow_run_id for flow_run_id, state in states.items() if state in ("RUNNING", "PENDING"))
