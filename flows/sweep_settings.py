"""Search settings of the main job with Optuna; trials share cached stages.

A study is stored in `<output_dir>/sweeps/<study>.journal`, so an interrupted sweep resumes; its report lies in
`<output_dir>/sweeps/<study>/report.html`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow
from prefect.runtime import deployment

from conf.compose import compile_request
from conf.request import RunRequest
from conf.schema import RunConfig
from conf.sweep import SweepRequest, check_sweep
from conf.trust import allowed_roots
from flows.personalize_subject import personalize_subject
from flows.runs.context import progress_of_run
from flows.runs.log import make_run_progress
from flows.sweeps.outcome import SweepOutcome, collect_outcome, describe_trial
from flows.sweeps.plots import draw_plots
from flows.sweeps.report import write_report
from flows.sweeps.runners import LocalRunner, Runner, find_pool
from flows.sweeps.study import SweepStudy
from flows.sweeps.trials import REGISTERED, SEED_VALUES, Trials, make_runs
from tasks.errors import ConfigError, ServiceUnavailable
from tasks.manifests.run_summary import RegisteredModel, RunSummary
from tasks.services.tracking.base import RUN_TAG, MetricRow
from tasks.services.tracking.mlflow_tracker import MlflowTracker

if TYPE_CHECKING:
    from optuna.trial import Trial

NO_POOL = "--parallel: no work pool with a worker is reachable (`likeness up` starts one); trials run one at a time"


@flow(name="sweep-settings", persist_result=False)
def sweep_settings(request: SweepRequest) -> SweepOutcome:
    """Run the study's remaining trials and return all results with the best one."""
    if deployment.id is None:
        config = compile_request(request.base)  # its values were checked where it was typed
    else:
        config = check_sweep(request, roots=allowed_roots())
    if config.subject.approval == "ask":
        raise ConfigError("a sweep asks nobody: approve the photos in one run, then leave out subject.approval=ask")
    return run_sweep(request, config, personalize_subject)


def run_sweep(request: SweepRequest, config: RunConfig, run: Callable[[RunRequest], RunSummary]) -> SweepOutcome:
    """Run the trials that are left, with `run` for each run of one, and write the report.

    Raises:
        ConfigError: no trial is complete.

    """
    folder = Path(config.output_dir) / "sweeps"
    study = SweepStudy(request, folder, seed=config.seed)
    trials = Trials(study, choose_runner(request, run), config, on_complete=lambda trial, summaries: None)
    tracking = None if trials.find_limit() else open_tracking(study, config)
    if tracking is not None:
        trials.on_complete = tracking.track
    report = folder / request.study_name / "report.html"
    ended_by, is_failed = "", True
    try:
        ended_by = trials.run()
        is_failed = False
    finally:
        # Also where it was interrupted: what is known so far.
        outcome = collect_outcome(study, trials.ended, ended_by=ended_by, report=report)
        if tracking is not None:
            tracking.finish(is_failed=is_failed)
        write_report(outcome, request, draw_plots(study))
    if not outcome.best:
        reasons = "; ".join(dict.fromkeys(trial.error for trial in outcome.trials if trial.error))
        raise ConfigError(f"no trial of {request.study_name} finished: {reasons or 'see the runs'}")
    if request.publish_best:
        outcome = outcome.model_copy(update={"published": publish_best(study, config, run)})
    return outcome


def choose_runner(request: SweepRequest, run: Callable[[RunRequest], RunSummary]) -> Runner:
    """Return a runner on a work pool where several trials are wanted at once, else this process's."""
    if request.num_parallel > 1:
        pool = find_pool(request.num_parallel)
        if pool is not None:
            return pool
        note(NO_POOL)
    return LocalRunner(run)


def publish_best(
    study: SweepStudy, config: RunConfig, run: Callable[[RunRequest], RunSummary]
) -> RegisteredModel | None:
    """Register the model of the best trial, of its best seed: all stages but publishing are cached."""
    best = study.best()[0]
    sign = -1 if study.objectives[0].is_minimized else 1
    table = best.user_attrs[SEED_VALUES]
    index = max(range(len(table)), key=lambda seed: sign * table[seed][0])
    request = make_runs(study, config, describe_trial(best).settings)[index]
    return run(request.model_copy(update={"settings": {**request.settings, REGISTERED: True}})).registered


@dataclass(frozen=True)
class TrialRow:
    """What the tracking server is told of a trial."""

    name: str
    params: dict[str, str]
    rows: list[MetricRow]
    ended_ms: int


@dataclass
class SweepTracking:
    """The sweep's own tracking run, the parent of its trials'. A server that is down doesn't stop the sweep."""

    tracker: MlflowTracker
    study: SweepStudy
    config: RunConfig
    pending: list[TrialRow] = field(default_factory=list)
    """Trials that the server does not have yet."""

    def track(self, trial: "Trial", summaries: Sequence[RunSummary]) -> None:
        """Log one trial as a child, with means over its seeds."""
        tables = [summary.metrics["tuned"] for summary in summaries]
        names = [name for name in tables[0] if all(table.get(name) is not None for table in tables)]
        rows = [(f"tuned/{name}", sum(table[name] or 0.0 for table in tables) / len(tables), 0) for name in names]
        columns = [list(column) for column in zip(*trial.user_attrs[SEED_VALUES], strict=True)]
        for objective, column in zip(self.study.objectives, columns, strict=True):
            name = "objective" if len(columns) == 1 else f"objective/{objective.name}"
            rows.append((name, sum(column) / len(column), 0))
        params = {key: str(item) for key, item in trial.params.items()}
        self.pending.append(TrialRow(summaries[0].run_id, params, rows, int(time.time() * 1000)))
        self.send()

    def send(self) -> bool:
        """Send what is left, in order; return whether the server has all of it."""
        try:
            self.tracker.check()  # MLflow's own retries would wait for minutes
            if self.tracker.run_id is None:
                self.open()
            while self.pending:
                self.send_trial(self.pending[0])
                self.pending.pop(0)
        except ServiceUnavailable as error:
            note(f"warning: {error}; the sweep goes on, and its trials are sent when the server answers")
            return False
        return True

    def open(self) -> None:
        """Open the parent run."""
        request = self.study.request
        params = {key: ", ".join(map(str, values)) for key, values in request.space.items()}
        params |= {key: str(searched) for key, searched in request.ranges.items()}
        self.tracker.start(name=request.study_name, params=params, tags={"likeness.kind": "sweep"})

    def send_trial(self, trial: TrialRow) -> None:
        """Log a trial; one whose earlier call failed half-way is continued, not logged twice."""
        child = MlflowTracker(self.config.tracking, folder=Path(self.config.output_dir))
        child.parent_run_id = self.tracker.run_id
        tags = {"likeness.kind": "trial", RUN_TAG: f"{self.tracker.run_id}/{trial.name}"}
        child.start(name=trial.name, params=trial.params, tags=tags)
        child.log_metrics(trial.rows, at_ms=trial.ended_ms)
        child.finish(is_failed=False)

    def finish(self, *, is_failed: bool) -> None:
        """Send what is left and close the parent run."""
        try:
            if self.send():
                self.tracker.finish(is_failed=is_failed)
        except ServiceUnavailable as error:
            note(f"warning: the sweep's tracking run stays open: {error}")


def note(text: str) -> None:
    """Show a line where the sweep's progress is shown."""
    (progress_of_run.get() or make_run_progress()).note(text)


def open_tracking(study: SweepStudy, config: RunConfig) -> SweepTracking | None:
    """Open the sweep's own tracking run."""
    if config.tracking.kind != "mlflow":
        return None
    tracking = SweepTracking(MlflowTracker(config.tracking, folder=Path(config.output_dir)), study, config)
    tracking.send()
    return tracking
