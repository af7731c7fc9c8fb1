"""`likeness cost`: LLM calls, tokens and cost of a configuration over all its runs, from their ledgers."""

import json
from pathlib import Path
from typing import Any

from flows.cli.console import make_cell, show_usd
from flows.run_records import list_run_folders, read_summary
from tasks.errors import ConfigError
from tasks.services.llm.budget.ledger import read_rows

COLUMNS = ("input_tokens", "cached_tokens", "image_tokens", "output_tokens", "reasoning_tokens")
TITLES = (
    "role", "profile", "served model", "calls", "cached", "failed",
    "in", "in cached", "image", "out", "reasoning", "USD",
)  # fmt: skip
LEDGER = "ledger.jsonl"


def print_costs(folder: Path, *, is_json: bool) -> None:
    """Print totals by role and model over all runs of a run's configuration, failed and suspended ones included."""
    folders = find_same(folder)
    ledgers = {run: read_ledger(run) for run in folders}
    groups = sum_costs([row for rows, _ in ledgers.values() for row in rows])
    if is_json:
        print(json.dumps(groups, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for number, title in enumerate(TITLES):
        table.add_column(title, justify="left" if number < 3 else "right")
    for row in groups:
        served = row["served_model"] + (" (batch)" if row["is_batch"] else "")
        counts = [str(row[name]) for name in ("calls", "cached_replies", "failed", *COLUMNS)]
        cells = (row["role"], row["profile"], served, *counts, show_usd(row["cost_usd"]))
        table.add_row(*map(make_cell, cells))
    Console(width=160).print(table)
    for run, (rows, num_damaged) in ledgers.items():
        note = f", {num_damaged} damaged ledger lines skipped" if num_damaged else ""
        print(f"{run.name}: {read_summary(run).status}, {describe_totals(sum_costs(rows))}{note}")
    print(f"total: {describe_totals(groups)}")
    faults = [row for rows, _ in ledgers.values() for row in rows if row.get("usage_fault")]
    if faults:
        known = sum(row["cost_usd"] or 0.0 for row in faults)
        print(f"{show_usd(known)} USD of this is reserved for {len(faults)} attempts without credible usage")


def describe_totals(groups: list[dict[str, Any]]) -> str:
    """Return calls, cached replies and cost in one phrase."""
    costs = [row["cost_usd"] for row in groups]
    total = None if None in costs else sum(costs)
    calls, cached = sum(row["calls"] for row in groups), sum(row["cached_replies"] for row in groups)
    return f"{calls} calls, {cached} cached replies, {show_usd(total)} USD"


def find_paying_run(output: Path, name: str) -> Path:
    """Return a run's folder in any status; `latest` is the newest that called an LLM."""
    paying = sorted(path.parent for path in output.glob(f"*/{LEDGER}"))
    if name == "latest" and paying:
        return paying[-1]
    folders = list_run_folders(output)
    matches = [folder for folder in folders if folder.name == name or folder.name.endswith(f"-{name}")]
    if len(matches) == 1:
        return matches[0]
    raise ConfigError(f"no run {name!r} in {output}; `likeness runs` lists them")


def find_same(folder: Path) -> list[Path]:
    """Return the folders of all runs with the same configuration, oldest first; the cap on money may differ."""
    target = read_identity(folder)
    runs = list_run_folders(folder.parent)
    same = [run for run in runs if run == folder or (target is not None and read_identity(run) == target)]
    if not any((run / LEDGER).exists() for run in same):
        raise ConfigError(f"run {folder.name} made no LLM calls")
    return same


def read_identity(folder: Path) -> Any:
    """Return a run's configuration without its cap; None where it can't be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        config["llm"].pop("budget_usd", None)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return config


def read_ledger(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return a run's attempts, and how many lines are damaged."""
    path = folder / LEDGER
    rows = list(read_rows(path)) if path.exists() else []
    return [row for row in rows if row is not None], rows.count(None)


def sum_costs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return totals by role, profile, serving model and way, in order of first use."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        keys = ("role", "profile", "served_model", "is_batch")
        group = groups.setdefault(
            tuple(row[key] for key in keys),
            {**{key: row[key] for key in keys}, "calls": 0, "cached_replies": 0, "failed": 0, "cost_usd": 0.0}
            | dict.fromkeys(COLUMNS, 0),
        )
        if row["outcome"] == "cached":
            group["cached_replies"] += 1
            continue
        group["calls"] += 1
        group["failed"] += row["outcome"] != "ok"
        for name in COLUMNS:
            group[name] += row["usage"][name]
        known = group["cost_usd"] is not None and row["cost_usd"] is not None
        group["cost_usd"] = group["cost_usd"] + row["cost_usd"] if known else None
    return list(groups.values())
