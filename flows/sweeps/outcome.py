"""What a sweep found: its trials with intervals, the best of them, and the commands that repeat those."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from conf.request import Value
from conf.sweep import SweepRequest
from flows.runs.records import to_overrides
from flows.sweeps.study import ERROR, SweepStudy, is_interrupted
from flows.sweeps.trials import CACHED, COST, LATENTS, METRIC_VALUES, RUNS, SEED_VALUES, SEEDS, SETTINGS
from tasks.errors import ConfigError
from tasks.manifests.run_summary import RegisteredModel
from tasks.stage.digests import digest

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

CONFIDENCE = 0.95


class TrialResult(BaseModel):
    """One trial that has ended."""

    trial: int
    status: Literal["complete", "failed", "pruned", "interrupted"]
    settings: dict[str, Value]
    values: list[float] = []
    """Of each objective: the mean over seeds."""
    intervals: list[tuple[float, float]] = []
    """Of each mean, 95 %, by Student's t; none for a single seed."""
    seed_values: list[list[float]] = []
    """(seeds, objectives)"""
    seeds: list[int] = []
    """Training seeds, where there are several."""
    metrics: dict[str, list[float]] = {}
    """Of each metric and axis of the judge: a value per seed."""
    run_ids: list[str] = []
    cached_stages: dict[str, int] = {}
    """By stage: how many of the trial's runs found it in the store."""
    cached_latents: int = 0
    """Of how many images its trainings found the latents instead of encoding them."""
    cost_usd: float | None = None
    error: str = ""


class SeedRow(BaseModel):
    """A metric of one setting over training seeds."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    """Of the mean, 95 %, by Student's t; None where all values are equal, which says nothing of others."""
    values: list[float]
    """By seed."""


class SweepOutcome(BaseModel):
    """The trials of a study, the best of all, and what this sweep's runs shared."""

    study: str
    objectives: list[str]
    trials: list[TrialResult]
    best: list[TrialResult]
    """The best trial, or the Pareto front; empty where none is complete."""
    commands: list[str]
    """What repeats each of the best."""
    num_new_trials: int
    shared_stages: dict[str, int]
    shared_latents: int = 0
    """Images, counted once per training."""
    ended_by: str
    """The limit that ended the sweep."""
    cost_usd: float | None
    journal: str
    report: str
    published: RegisteredModel | None = None


def collect_outcome(study: SweepStudy, ended: Sequence[int], *, ended_by: str, report: Path) -> SweepOutcome:
    """Return the study's trials and the best of them."""
    from flows.sweeps.trials import sum_costs

    trials = [describe_trial(trial) for trial in study.trials("COMPLETE", "PRUNED", "FAIL")]
    best = [describe_trial(trial) for trial in study.best()]
    shared: Counter[str] = Counter()
    for trial in trials:
        if trial.trial in ended:
            shared.update({name: count for name, count in trial.cached_stages.items() if count})
    return SweepOutcome(
        study=study.request.study_name,
        objectives=[str(objective) for objective in study.objectives],
        trials=trials,
        best=best,
        commands=[make_command(study.request, trial.settings) for trial in best],
        num_new_trials=len(ended),
        shared_stages=dict(shared),
        shared_latents=sum(trial.cached_latents for trial in trials if trial.trial in ended),
        ended_by=ended_by,
        cost_usd=sum_costs(study),
        journal=str(study.journal),
        report=str(report),
    )


def describe_shared(outcome: SweepOutcome) -> str:
    """Return how many of the new trials' runs shared each stage, and the latents of how many images were shared."""
    stages = ", ".join(f"{name} {count}" for name, count in outcome.shared_stages.items()) or "none"
    latents = f"; cached latents: {outcome.shared_latents} images" if outcome.shared_latents else ""
    return f"cached stages: {stages}{latents}"


def rank_trials(journal: Path) -> list[TrialResult]:
    """Return the complete trials of a study, best first: a Pareto front, then by the first objective.

    Of trials with the same settings, the first.

    Raises:
        ConfigError: the journal can't be read.

    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.load_study(study_name=journal.stem, storage=JournalStorage(JournalFileBackend(str(journal))))
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        front = {trial.number for trial in study.best_trials} if len(study.directions) > 1 else set()
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"the study {journal} can't be read; name its runs instead, `likeness runs` lists them"
        ) from error
    sign = 1 if study.directions[0].name == "MINIMIZE" else -1
    first_of: dict[str, int] = {}
    for trial in trials:  # in the order of their numbers
        first_of.setdefault(digest(describe_trial(trial).settings), trial.number)
    kept = [trial for trial in trials if trial.number in first_of.values()]
    kept.sort(key=lambda trial: (trial.number not in front, sign * trial.values[0], trial.number))
    return [describe_trial(trial) for trial in kept]


def describe_trial(trial: "FrozenTrial") -> TrialResult:
    """Return a trial as it is shown."""
    attributes = trial.user_attrs
    is_complete = trial.state.name == "COMPLETE"
    table = attributes.get(SEED_VALUES, [])
    status: Literal["complete", "failed", "pruned", "interrupted"] = "failed"
    if is_complete or trial.state.name == "PRUNED":
        status = "complete" if is_complete else "pruned"
    elif is_interrupted(trial):
        status = "interrupted"
    return TrialResult(
        trial=trial.number,
        status=status,
        settings=attributes.get(SETTINGS, dict(trial.params)),
        values=list(trial.values) if is_complete else [],
        intervals=[compute_interval(column) for column in zip(*table, strict=True)] if len(table) > 1 else [],
        seed_values=table,
        seeds=attributes.get(SEEDS, []),
        metrics=attributes.get(METRIC_VALUES, {}),
        run_ids=attributes.get(RUNS, []),
        cached_stages=attributes.get(CACHED, {}),
        cached_latents=attributes.get(LATENTS, 0),
        cost_usd=attributes.get(COST),
        error=attributes.get(ERROR, ""),
    )


def estimate_metrics(trial: TrialResult) -> list[SeedRow]:
    """Return the mean of each metric over a trial's seeds with its 95 % interval; nothing for a single seed."""
    from tasks.evaluation.comparison import JUDGED
    from tasks.metrics import METRICS

    if len(trial.seeds) < 2:
        return []
    known = {**METRICS, **JUDGED}
    return [
        SeedRow(
            name=known[key].name if key in known else key,
            mean=sum(values) / len(values),
            interval=compute_interval(values) if len(set(values)) > 1 else None,
            values=values,
        )
        for key, values in trial.metrics.items()
    ]


def compute_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of at least two values, by Student's t."""
    import numpy as np
    from scipy import stats

    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean - half, mean + half


def make_dashboard_command(journal: str) -> str:
    """Return the command line that opens a study in Optuna's dashboard, quoted for a shell."""
    return f"optuna-dashboard {shlex.quote(journal)}"


def make_command(request: SweepRequest, settings: Mapping[str, Value]) -> str:
    """Return the command line that runs one trial's settings, quoted for a shell."""
    return " ".join(["likeness run", *to_overrides(request.make_trial(settings))])
