"""`likeness sweep` in the terminal: the sweep, then a table of its trials."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flows.cli.console import make_cell, show_usd
from flows.cli.results.runs import shorten
from flows.cli.run.job import ready_for_flows

if TYPE_CHECKING:
    from flows.sweeps.outcome import SweepOutcome, TrialResult


def sweep_in_terminal(settings: Sequence[str], options: Mapping[str, object]) -> int:
    """Run a sweep and print its trials. `options` are fields of `SweepRequest`."""
    from conf.sweep import parse_sweep

    request = parse_sweep(settings, options)
    with ready_for_flows(request.base) as (_, progress, _):
        from flows.runs.context import progress_of_run
        from flows.sweep_settings import sweep_settings

        token = progress_of_run.set(progress)
        try:
            outcome = sweep_settings(request)
        finally:
            progress_of_run.reset(token)
            progress.close()
    print_sweep(outcome)
    return 0


def print_sweep(outcome: "SweepOutcome") -> None:
    """Print trials, best first, shared stages, and where report and study are."""
    from rich.console import Console
    from rich.table import Table

    from flows.sweeps.report import count_cached, describe_values

    print(f"\n{outcome.study}: {', '.join(outcome.objectives)}")
    best = [trial.trial for trial in outcome.best]
    names = list(dict.fromkeys(name for trial in outcome.trials for name in trial.settings))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "trial", " ; ".join(outcome.objectives), *names, "cached", "USD", "run"):
        table.add_column(make_cell(name), overflow="fold")
    for trial in sort_trials(outcome):
        cost = "" if trial.status == "interrupted" else show_usd(trial.cost_usd)
        settings = [str(trial.settings.get(name, "")) for name in names]
        value = describe_values(trial) if trial.values else trial.status
        table.add_row(
            "*" if trial.trial in best else " ", str(trial.trial), value, *map(make_cell, settings),
            count_cached(trial), cost, " ".join(trial.run_ids),
        )  # fmt: skip
    Console(width=160).print(table)
    for trial in outcome.trials:
        if trial.error:
            print(f"  trial {trial.trial} {trial.status}: {trial.error}")
    shared = ", ".join(f"{name} {count}" for name, count in outcome.shared_stages.items()) or "none"
    print(f"{outcome.num_new_trials} new trials; cached stages: {shared}")
    print(f"ended by: {outcome.ended_by}; {show_usd(outcome.cost_usd)} USD in all\n")
    for command in outcome.commands:
        print(f"best      {command}")
    if outcome.published is not None and outcome.published.model:
        print(f"published {outcome.published.model}, version {outcome.published.version}")
    print(f"report    {shorten(outcome.report)}")
    print(f"study     optuna-dashboard {shorten(outcome.journal)}")


def sort_trials(outcome: "SweepOutcome") -> "list[TrialResult]":
    """Return the trials, best first; those without a value last."""
    sign = 1 if outcome.objectives[0].endswith(":min") else -1
    return sorted(outcome.trials, key=lambda t: (not t.values, sign * t.values[0] if t.values else 0.0, t.trial))
