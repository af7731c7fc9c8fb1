"""`likeness cost`: what a run asked of LLMs and what it paid, from its ledger."""

import json
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError

COLUMNS = ("input_tokens", "cached_tokens", "image_tokens", "output_tokens", "reasoning_tokens")


def print_costs(folder: Path, *, is_json: bool) -> None:
    """Print totals by role and model. Raises ConfigError where the run has no ledger."""
    groups = sum_costs(read_ledger(folder))
    if is_json:
        print(json.dumps(groups, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for number, title in enumerate(
        ("role", "profile", "served by", "calls", "kept", "failed", "in", "cached", "image", "out", "reasoning", "USD")
    ):
        table.add_column(title, justify="left" if number < 3 else "right")
    for row in groups:
        served = row["served_model"] + (" (batch)" if row["is_batch"] else "")
        counts = [str(row[name]) for name in ("calls", "kept", "failed", *COLUMNS)]
        table.add_row(row["role"], row["profile"], served, *counts, show_usd(row["cost_usd"]))
    Console(width=160).print(table)
    costs = [row["cost_usd"] for row in groups]
    total = None if None in costs else sum(costs)
    calls, kept = sum(row["calls"] for row in groups), sum(row["kept"] for row in groups)
    print(f"{calls} calls, {kept} replies that were kept from before, {show_usd(total)} USD")


def show_usd(cost: float | None) -> str:
    """Return money as text; what is unknown is said to be."""
    return "unknown" if cost is None else f"{cost:.5f}"


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """Return a run's attempts. Raises ConfigError where there are none."""
    path = folder / "ledger.jsonl"
    if not path.exists():
        raise ConfigError(f"run {folder.name} asked no LLM")
    return [json.loads(line) for line in path.read_text().splitlines()]


def sum_costs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return totals by role, profile, serving model and way, in order of first use."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        keys = ("role", "profile", "served_model", "is_batch")
        group = groups.setdefault(
            tuple(row[key] for key in keys),
            {**{key: row[key] for key in keys}, "calls": 0, "kept": 0, "failed": 0, "cost_usd": 0.0}
            | dict.fromkeys(COLUMNS, 0),
        )
        if row["outcome"] == "cached":
            group["kept"] += 1
            continue
        group["calls"] += 1
        group["failed"] += row["outcome"] != "ok"
        for name in COLUMNS:
            group[name] += row["usage"][name]
        known = group["cost_usd"] is not None and row["cost_usd"] is not None
        group["cost_usd"] = group["cost_usd"] + row["cost_usd"] if known else None
    return list(groups.values())
