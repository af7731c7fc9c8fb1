"""Trials of a study, one after another or several at once, until a budget or the search ends."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conf.request import RunRequest, Value
from conf.schema import RunConfig
from conf.sweep import DINO_X_CLIP_T, TUNED, Objective, suggest_figures
from flows.sweeps.runners import POLL_SECONDS, ActiveRun, Runner, RunOrder
from flows.sweeps.study import ERROR, FINISHED, TOKEN, SweepStudy, is_interrupted
from tasks.errors import ConfigError
from tasks.manifests.run_summary import RunSummary
from tasks.stage.digests import digest

if TYPE_CHECKING:
    from optuna.trial import Trial

MAX_FAILURES = 5
"""Failed trials in a row that end a sampled search: the next would fail like them."""
SETTINGS, RUNS, SEED_VALUES, CACHED, COST = "settings", "runs", "seed_values", "cached_stages", "cost_usd"
SEEDS, METRIC_VALUES, LATENTS = "seeds", "metric_values", "cached_latents"
"""Names of user attributes of a trial."""
REGISTERED = "publishing.is_registered"


@dataclass
class ActiveTrial:
    """A trial whose runs are not all done."""

    trial: "Trial"
    values: dict[str, Value]
    requests: list[RunRequest]
    summaries: list[RunSummary] = field(default_factory=list)
    run: ActiveRun | None = None
    cost_usd: float | None = 0.0


@dataclass
class Trials:
    """Runs the trials of a study."""

    study: SweepStudy
    runner: Runner
    config: RunConfig
    on_complete: Callable[["Trial", Sequence[RunSummary]], None]
    """Called with each complete trial and its runs, before it is reported to the study."""
    ended: list[int] = field(default_factory=list)
    """Numbers of the trials that ended here."""
    num_failures: int = 0
    """In a row."""

    def run(self) -> str:
        """Run trials until one of the limits is reached; return which.

        Anything that isn't a trial's failure, such as Ctrl-C, cancels the runs and queues their trials again.
        """
        active: list[ActiveTrial] = []
        try:
            while True:
                reason = self.fill(active)
                if not active:
                    return reason
                is_idle = True
                for current in list(active):
                    if self.advance(current):
                        is_idle = False
                        if current.trial.number in self.ended:
                            active.remove(current)
                if is_idle:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            left = [current for current in active if current.trial.number not in self.ended]
            for current in left:
                if current.run is not None:
                    current.run.cancel()
            self.study.give_up([current.trial for current in left])
            raise

    def fill(self, active: list[ActiveTrial]) -> str:
        """Take trials up to the runner's capacity; return why no more are taken."""
        reason = ""
        while len(active) < self.runner.capacity and not (reason := self.find_limit()):
            taken = self.study.ask()
            if taken is None:
                return "every combination is tried"
            trial, values = taken
            active.append(ActiveTrial(trial, values, make_runs(self.study, self.config, values)))
        return reason

    def find_limit(self) -> str:
        """Return the limit that allows no further trial, or an empty string."""
        request = self.study.request
        num_taken = len(self.study.trials(*FINISHED, "RUNNING"))
        if num_taken >= request.max_trials:
            return f"{num_taken} of {request.max_trials} trials are done"
        hours = measure_hours(self.study)
        if request.max_hours is not None and hours >= request.max_hours:
            return f"--hours {request.max_hours:g} are used"
        if request.max_usd is not None:
            cost = sum_costs(self.study)
            if cost is None:
                return "--usd cannot be kept: the price of a trial is unknown; see `likeness cost`"
            if cost >= request.max_usd:
                return f"--usd {request.max_usd:g} are spent ({cost:.5f})"
        if not request.is_grid and self.num_failures >= MAX_FAILURES:
            return f"{MAX_FAILURES} trials in a row failed"
        return ""

    def advance(self, current: ActiveTrial) -> bool:
        """Start the trial's next run or take its outcome; return whether there was anything to do."""
        if current.run is None:
            current.run = self.runner.start(self.make_order(current))
        outcome = current.run.poll()
        if outcome is None:
            return False
        current.run = None
        known = current.cost_usd is not None and outcome.cost_usd is not None
        current.cost_usd = (current.cost_usd or 0.0) + (outcome.cost_usd or 0.0) if known else None
        if outcome.summary is None:
            self.end(current, "PRUNED" if outcome.is_pruned else "FAIL", outcome.error)
        else:
            current.summaries.append(outcome.summary)
            if len(current.summaries) == len(current.requests):
                self.complete(current)
        return True

    def make_order(self, current: ActiveTrial) -> RunOrder:
        """Return the trial's next run."""
        request = current.requests[len(current.summaries)]
        # Runs of failed trials with these settings: a repetition of one is a sub-run of its own.
        tries = [t for t in self.study.trials("FAIL", "PRUNED") if t.user_attrs.get(SETTINGS) == current.values]
        attempt = sum(not is_interrupted(trial) for trial in tries)
        name = f"{self.study.study.user_attrs[TOKEN]}-{digest(request)[:16]}-{attempt}"
        # Runs of one seed are compared: the trial's first.
        is_watched = self.study.request.pruner != "none" and not current.summaries
        return RunOrder(request, name, self.make_pruning(current.trial) if is_watched else None)

    def make_pruning(self, trial: "Trial") -> Callable[[int, float, float | None], bool]:
        """Return what reports a trial's validation to the study and asks whether it is pruned."""
        is_minimized = self.study.objectives[0].is_minimized

        def should_prune(step: int, loss: float, similarity: float | None) -> bool:
            # Intermediate values have the study's direction: a loss is negated where the objective is maximized.
            value = (-loss if similarity is None else similarity) * (-1 if is_minimized else 1)
            if not math.isfinite(value):
                return False
            trial.report(value, step)
            return trial.should_prune()

        return should_prune

    def complete(self, current: ActiveTrial) -> None:
        """Tell the study a trial's values: the means over its seeds."""
        objectives = self.study.objectives
        try:
            table = [[read_figure(summary, objective) for objective in objectives] for summary in current.summaries]
        except ConfigError as error:
            # The next trial's summary would lack the figure too.
            self.end(current, "FAIL", str(error))
            raise
        current.trial.set_user_attr(SEED_VALUES, table)
        current.trial.set_user_attr(METRIC_VALUES, list_metrics(current.summaries))
        self.record(current)
        self.on_complete(current.trial, current.summaries)
        self.study.study.tell(current.trial, [sum(column) / len(table) for column in zip(*table, strict=True)])
        self.ended.append(current.trial.number)
        self.num_failures = 0

    def end(self, current: ActiveTrial, state: str, reason: str) -> None:
        """Tell the study that a trial failed or was pruned, and why."""
        from optuna.trial import TrialState

        current.trial.set_user_attr(ERROR, reason)
        self.record(current)
        self.study.study.tell(current.trial, state=TrialState[state])
        self.ended.append(current.trial.number)
        self.num_failures += state == "FAIL"

    def record(self, current: ActiveTrial) -> None:
        """Keep a trial's settings, runs, cost and cached stages with it; before `tell`, which closes it."""
        cached: dict[str, int] = {}
        for summary in current.summaries:
            for name, stage in summary.stages.items():
                cached[name] = cached.get(name, 0) + stage.cached
        for name, value in {
            SETTINGS: current.values,
            SEEDS: [request.seed for request in current.requests if request.seed is not None],
            RUNS: [summary.run_id for summary in current.summaries],
            CACHED: cached,
            LATENTS: sum(map(count_latents, current.summaries)),
            COST: current.cost_usd,
        }.items():
            current.trial.set_user_attr(name, value)


def count_latents(summary: RunSummary) -> int:
    """Return how many images' latents a training found instead of encoding them; a cached training needed none."""
    training = summary.stages.get("training")
    return 0 if training is None or training.cached else training.counts.get("cached_latents", 0)


def make_runs(study: SweepStudy, config: RunConfig, values: Mapping[str, Value]) -> list[RunRequest]:
    """Return the requests of a trial's runs, one per seed, the base's first. Trials register no model."""
    request = study.request
    trial = request.make_trial({REGISTERED: False, **values})
    if request.num_seeds == 1:
        return [trial]
    seeds = [(config.seed + index) % 2**31 for index in range(request.num_seeds)]
    return [trial.model_copy(update={"seed": seed}) for seed in seeds]


def read_figure(summary: RunSummary, objective: Objective) -> float:
    """Return a figure of a run. Raises ConfigError where it was not measured."""
    figures = list_numbers(summary.model_dump(mode="json"))
    if objective.name == DINO_X_CLIP_T:
        parts = [figures.get(f"metrics.tuned.{name}") for name in ("dino", "clip_t")]
    else:
        parts = [figures.get(objective.name)]
    found = [part for part in parts if part is not None and math.isfinite(part)]
    if len(found) < len(parts):
        near = suggest_figures(objective.name, figures)
        raise ConfigError(f"objective {objective.name} was not measured by run {summary.run_id}{near}")
    return math.prod(found)


def list_metrics(summaries: Sequence[RunSummary]) -> dict[str, list[float]]:
    """Return the tuned model's metrics and mean grades that all runs have: a value per run, by short name."""
    tables = [list_numbers(summary.model_dump(mode="json")) for summary in summaries]
    names = [name for name in tables[0] if name.startswith(TUNED) and all(name in table for table in tables)]
    return {name.rsplit(".", 1)[-1]: [table[name] for table in tables] for name in names}


def list_numbers(values: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Return the numbers of nested values by dotted name."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= list_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def measure_hours(study: SweepStudy) -> float:
    """Return the hours in which trials were at work, those of earlier processes included."""
    spans: list[tuple[float, float]] = []
    for trial in study.trials(*FINISHED, "FAIL", "RUNNING"):
        # An interrupted trial ends when the next process finds it, which may be days later.
        if trial.datetime_start is not None and not is_interrupted(trial):
            end = trial.datetime_complete
            spans.append((trial.datetime_start.timestamp(), end.timestamp() if end else time.time()))
    total, covered = 0.0, -math.inf
    for start, stop in sorted(spans):  # trials at the same time count once
        total += max(0.0, stop - max(start, covered))
        covered = max(covered, stop)
    return total / 3600


def sum_costs(study: SweepStudy) -> float | None:
    """Return the cost of all trials in USD; None where one has a price that is unknown."""
    costs = [trial.user_attrs[COST] for trial in study.trials() if COST in trial.user_attrs]
    return None if any(cost is None for cost in costs) else float(sum(costs))
