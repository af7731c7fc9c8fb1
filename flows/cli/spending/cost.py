"""`likeness cost`: LLM calls, tokens and cost of a configuration over all its runs, from their ledgers."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.cli.console import make_cell, show_usd
from flows.cli.results.runs import find_run
from flows.runs.records import list_run_folders, read_summary
from tasks.errors import ConfigError
from tasks.services.llm.budget.ledger import LedgerRow, read_rows

COLUMNS = ("input_tokens", "cached_tokens", "image_tokens", "output_tokens", "reasoning_tokens")
TITLES = (
    "role", "profile", "served model", "calls", "cached", "failed",
    "in", "in cached", "image", "out", "reasoning", "USD",
)  # fmt: skip
LEDGER = "ledger.jsonl"


@dataclass
class CostGroup:
    """Totals of the attempts that share role, profile, served model and mode (batch or calls)."""

    role: str
    profile: str
    served_model: str
    is_batch: bool
    calls: int = 0
    cached_replies: int = 0
    failed: int = 0
    cost_usd: float | None = 0.0
    """None where the price of any call is unknown."""
    input_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, row: LedgerRow) -> None:
        """Count one attempt."""
        if row.outcome == "cached":
            self.cached_replies += 1
            return
        self.calls += 1
        self.failed += row.outcome != "ok"
        for name in COLUMNS:
            setattr(self, name, getattr(self, name) + getattr(row.usage, name))
        known = self.cost_usd is not None and row.cost_usd is not None
        self.cost_usd = (self.cost_usd or 0.0) + (row.cost_usd or 0.0) if known else None


def print_costs(folder: Path, *, is_json: bool) -> None:
    """Print totals by role and model over all runs of a run's configuration, failed and suspended ones included."""
    folders = find_same(folder)
    ledgers = {run: read_ledger(run) for run in folders}
    groups = sum_costs([row for rows, _ in ledgers.values() for row in rows])
    if is_json:
        print(json.dumps([asdict(group) for group in groups], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for number, title in enumerate(TITLES):
        table.add_column(title, justify="left" if number < 3 else "right")
    for group in groups:
        served = group.served_model + (" (batch)" if group.is_batch else "")
        counts = [str(getattr(group, name)) for name in ("calls", "cached_replies", "failed", *COLUMNS)]
        cells = (group.role, group.profile, served, *counts, show_usd(group.cost_usd))
        table.add_row(*map(make_cell, cells))
    Console(width=160).print(table)
    for run, (rows, num_damaged) in ledgers.items():
        note = f", {num_damaged} damaged ledger lines skipped" if num_damaged else ""
        print(f"{run.name}: {read_summary(run).status}, {describe_totals(sum_costs(rows))}{note}")
    print(f"total: {describe_totals(groups)}")
    faults = [row for rows, _ in ledgers.values() for row in rows if row.usage_fault]
    if faults:
        known = sum(row.cost_usd or 0.0 for row in faults)
        print(f"{show_usd(known)} USD of this is reserved for {len(faults)} attempts without credible usage")


def describe_totals(groups: list[CostGroup]) -> str:
    """Return calls, cached replies and cost in one phrase."""
    costs = [group.cost_usd for group in groups]
    total = None if None in costs else sum(cost or 0.0 for cost in costs)
    calls, cached = sum(group.calls for group in groups), sum(group.cached_replies for group in groups)
    return f"{calls} calls, {cached} cached replies, {show_usd(total)} USD"


def find_paying_run(output: Path, name: str) -> Path:
    """Return a run's folder in any status; `latest` is the newest that called an LLM."""
    return find_run(output, name, record=LEDGER)


def find_same(folder: Path) -> list[Path]:
    """Return the folders of all runs with the same configuration, oldest first; the spending cap may differ."""
    target = read_identity(folder)
    runs = list_run_folders(folder.parent)
    same = [run for run in runs if run == folder or (target is not None and read_identity(run) == target)]
    if not any((run / LEDGER).exists() for run in same):
        raise ConfigError(f"run {folder.name} made no LLM calls")
    return same


def read_identity(folder: Path) -> object:
    """Return a run's configuration without its cap; None where it can't be read."""
    try:
        # Raw JSON, so that runs of other versions can be compared too.
        config = json.loads((folder / "config.json").read_bytes())
        config["llm"].pop("budget_usd", None)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return config


def read_ledger(folder: Path) -> tuple[list[LedgerRow], int]:
    """Return a run's attempts, and how many lines are damaged."""
    path = folder / LEDGER
    rows = list(read_rows(path)) if path.exists() else []
    return [row for row in rows if row is not None], rows.count(None)


def sum_costs(rows: Iterable[LedgerRow]) -> list[CostGroup]:
    """Return totals by role, profile, served model and mode, in order of first use."""
    groups: dict[tuple[str, str, str, bool], CostGroup] = {}
    for row in rows:
        key = (row.role, row.profile, row.served_model, row.is_batch)
        groups.setdefault(key, CostGroup(*key)).add(row)
    return list(groups.values())
