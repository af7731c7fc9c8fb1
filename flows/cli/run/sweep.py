"""`likeness sweep` and `likeness run --seeds` in the terminal: the runs, then a table of trials or of metrics."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flows.cli.console import make_cell, show_usd
from flows.cli.results.runs import shorten
from flows.cli.run.job import ready_for_flows
from tasks.errors import ConfigError

if TYPE_CHECKING:
    from conf.sweep import SweepRequest
    from flows.runs.records import StoredRequest
    from flows.sweeps.outcome import SweepOutcome, TrialResult


def sweep_in_terminal(settings: Sequence[str], options: Mapping[str, object]) -> int:
    """Run a sweep and print its trials. `options` are fields of `SweepRequest`."""
    from conf.sweep import parse_sweep

    return run_study(parse_sweep(settings, options))


def repeat_in_terminal(stored: "StoredRequest", num_seeds: int) -> int:
    """Run one request with several seeds and print the mean of each metric. Raises ConfigError."""
    from pydantic import ValidationError

    from conf.compose import describe_invalid
    from conf.sweep import SweepRequest

    try:
        request = SweepRequest(base=stored.request, num_seeds=num_seeds)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error
    return run_study(request, is_trusted=stored.is_trusted)


def run_study(request: "SweepRequest", *, is_trusted: bool = True) -> int:
    """Run a study and print what it found."""
    with ready_for_flows(request.base, is_trusted=is_trusted) as (_, progress, _):
        from flows.runs.context import progress_of_run, trust_of_run
        from flows.sweep_settings import sweep_settings

        tokens = progress_of_run.set(progress), trust_of_run.set(is_trusted)
        try:
            outcome = sweep_settings(request)
        finally:
            progress_of_run.reset(tokens[0])
            trust_of_run.reset(tokens[1])
            progress.close()
    if request.is_search:
        print_sweep(outcome)
    else:
        print_seeds(outcome)
    return 0


def print_sweep(outcome: "SweepOutcome") -> None:
    """Print trials, best first, shared stages, and where report and study are."""
    from rich.console import Console
    from rich.table import Table

    from flows.sweeps.outcome import describe_shared
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
    print(f"{outcome.num_new_trials} new trials; {describe_shared(outcome)}")
    print(f"ended by: {outcome.ended_by}; {show_usd(outcome.cost_usd)} USD in all\n")
    for trial, command in zip(outcome.best, outcome.commands, strict=True):
        print(f"best      {command}")
        print_metrics(trial)
    print_places(outcome)


def print_seeds(outcome: "SweepOutcome") -> None:
    """Print the mean of each metric over seeds, and where the runs, the report and the study are."""
    from flows.sweeps.outcome import describe_shared

    [trial] = outcome.best
    print(f"\n{outcome.study}: {len(trial.seeds)} training seeds")
    print_metrics(trial)
    print(f"{describe_shared(outcome)}; {show_usd(outcome.cost_usd)} USD in all\n")
    print(f"runs      {' '.join(trial.run_ids)}")
    print_places(outcome)


def print_metrics(trial: "TrialResult") -> None:
    """Print a row per metric: mean, 95 % interval, and the value of each seed."""
    from rich.console import Console
    from rich.table import Table

    from flows.cli.results.runs import show_cell
    from flows.sweeps.outcome import estimate_metrics

    rows = estimate_metrics(trial)
    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("metric", "mean", "95 % interval", *(f"seed {seed}" for seed in trial.seeds)):
        table.add_column(name, justify="left" if name == "metric" else "right", overflow="fold")
    for row in rows:
        interval = "none" if row.interval is None else f"{show_cell(row.interval[0])}, {show_cell(row.interval[1])}"
        table.add_row(make_cell(row.name), show_cell(row.mean), interval, *map(show_cell, row.values))
    Console(width=160).print(table)
    print("intervals over training seeds (Student's t); none where all values are equal")


def print_places(outcome: "SweepOutcome") -> None:
    """Print what was published, where the report is, and the command that opens the study."""
    from flows.sweeps.outcome import make_dashboard_command

    if outcome.published is not None and outcome.published.model:
        print(f"published {outcome.published.model}, version {outcome.published.version}")
    print(f"report    {shorten(outcome.report)}")
    print(f"study     {make_dashboard_command(shorten(outcome.journal))}")


def sort_trials(outcome: "SweepOutcome") -> "list[TrialResult]":
    """Return the trials, best first; those without a value last."""
    sign = 1 if outcome.objectives[0].endswith(":min") else -1
    return sorted(outcome.trials, key=lambda t: (not t.values, sign * t.values[0] if t.values else 0.0, t.trial))
