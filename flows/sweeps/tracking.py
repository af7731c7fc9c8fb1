"""Tracking of a sweep: its own run, and one child per trial.

Trials wait in the study's attributes until the server has them, so that a resumed sweep sends what an outage left.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from conf.schema import RunConfig
from flows.runs.context import progress_of_run
from flows.runs.log import make_run_progress
from flows.sweeps.outcome import compute_interval
from flows.sweeps.study import TOKEN, SweepStudy, locked
from flows.sweeps.trials import SEED_VALUES
from tasks.errors import ServiceUnavailable
from tasks.manifests.run_summary import RunSummary
from tasks.services.tracking.base import RUN_TAG, MetricRow
from tasks.services.tracking.mlflow_tracker import MlflowTracker

if TYPE_CHECKING:
    from optuna.trial import Trial

STUDY_TAG, OPEN_PARENT = "likeness.study", "open-parent"
UNTRACKED = "untracked-"
"""Prefix of the study's attributes of trials that the server doesn't have; a trial's own are closed with it."""


class TrialRow(BaseModel):
    """What is logged of a trial."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int
    name: str
    params: dict[str, str]
    rows: tuple[MetricRow, ...]
    ended_ms: int


@dataclass
class SweepTracking:
    """The sweep's own tracking run, the parent of its trials'. A server that is down doesn't stop the sweep."""

    tracker: MlflowTracker
    study: SweepStudy
    config: RunConfig
    is_ended: bool = False
    """Whether no trial is left to run, so that the sweep only completes what an earlier one could not send."""
    outage: str = ""
    """Why the last call was not taken."""

    def track(self, trial: "Trial", summaries: Sequence[RunSummary]) -> None:
        """Log one trial as a child, with means over its seeds."""
        rows = summarize_seeds(summaries)
        columns = [list(column) for column in zip(*trial.user_attrs[SEED_VALUES], strict=True)]
        for objective, column in zip(self.study.objectives, columns, strict=True):
            name = "objective" if len(columns) == 1 else f"objective/{objective.name}"
            rows.append((name, sum(column) / len(column), 0))
        row = TrialRow(
            number=trial.number,
            name=summaries[0].run_id,
            params={key: str(item) for key, item in trial.params.items()},
            rows=tuple(rows),
            ended_ms=int(time.time() * 1000),
        )
        self.study.study.set_user_attr(f"{UNTRACKED}{row.number}", row.model_dump(mode="json"))
        if not self.send():
            note(f"warning: {self.outage}; the sweep continues, and its trials are sent when the server answers")

    def send(self) -> bool:
        """Send what is left, in order; return whether the server has all of it."""
        try:
            self.tracker.check()  # MLflow's own retries would wait for minutes
            if self.tracker.run_id is None:
                self.open()
            # Another process of the same study would send them too.
            with locked(self.study.journal.with_suffix(".tracking.lock")):
                for trial in list_untracked(self.study):
                    self.send_trial(trial)
                    self.study.study.set_user_attr(f"{UNTRACKED}{trial.number}", None)
        except ServiceUnavailable as error:
            self.outage = str(error)
            return False
        return True

    def open(self) -> None:
        """Open the parent run, and close those that earlier sweeps of the study, killed or cut off, left open."""
        request = self.study.request
        params = {key: ", ".join(map(str, values)) for key, values in request.space.items()}
        params |= {key: str(searched) for key, searched in request.ranges.items()}
        token = self.study.study.user_attrs[TOKEN]
        if self.is_ended and self.tracker.reopen(tag=STUDY_TAG, value=token):
            return
        # One that still runs beside this sweep says itself how it ended, which replaces this.
        self.tracker.close_stale(tag=STUDY_TAG, value=token, except_run="")
        tags = {"likeness.kind": "sweep", STUDY_TAG: token}
        try:
            self.tracker.start(name=request.study_name, params=params, tags=tags)
        finally:  # also where it was created, and its parameters could not be logged
            self.study.study.set_user_attr(OPEN_PARENT, self.tracker.run_id)

    def send_trial(self, trial: TrialRow) -> None:
        """Log a trial; one whose earlier call failed half-way is continued, not logged twice."""
        child = MlflowTracker(self.config.tracking, folder=Path(self.config.output_dir))
        child.parent_run_id = self.tracker.run_id
        # Of the study, not of the parent: a resumed sweep has another one.
        tags = {"likeness.kind": "trial", RUN_TAG: f"{self.study.study.user_attrs[TOKEN]}/{trial.number}"}
        child.start(name=trial.name, params=trial.params, tags=tags)
        child.log_metrics(trial.rows, at_ms=trial.ended_ms)
        child.finish(is_failed=False)

    def finish(self, *, is_failed: bool) -> None:
        """Send what is left and close the parent run, or say what the server doesn't have."""
        if not self.send():
            left = f"{len(list_untracked(self.study))} trials of {self.study.request.study_name}"
            note(f"warning: {left} are not tracked: {self.outage}; the same sweep, run again, sends them")
            return
        try:
            self.tracker.finish(is_failed=is_failed)
            self.study.study.set_user_attr(OPEN_PARENT, None)
        except ServiceUnavailable as error:
            note(f"warning: the sweep's tracking run stays open: {error}; the same sweep, run again, closes it")


def summarize_seeds(summaries: Sequence[RunSummary]) -> list[MetricRow]:
    """Return the tuned model's mean metrics over seeds with the ends of their 95 % intervals; of one seed, its own."""
    tables = [summary.metrics["tuned"] for summary in summaries]
    rows: list[MetricRow] = []
    for name in tables[0]:
        values = [value for table in tables if (value := table.get(name)) is not None]
        if len(values) < len(tables):
            continue
        ends: tuple[float | None, float | None] = (None, None)
        if len(values) > 1 and len(set(values)) > 1:
            ends = compute_interval(values)
        elif len(values) == 1 and (estimate := summaries[0].find_mean(name)) is not None:
            ends = (estimate.low, estimate.high)
        figures = {"": sum(values) / len(values), "_low": ends[0], "_high": ends[1]}
        rows += [(f"tuned/{name}{end}", value, 0) for end, value in figures.items() if value is not None]
    return rows


def needs_tracking(study: SweepStudy) -> bool:
    """Whether an earlier sweep left trials that the server doesn't have, or a parent run that is open."""
    return bool(list_untracked(study) or study.study.user_attrs.get(OPEN_PARENT))


def list_untracked(study: SweepStudy) -> list[TrialRow]:
    """Return the trials that the tracking server doesn't have yet, in their order."""
    rows = []
    for name, value in study.study.user_attrs.items():
        if name.startswith(UNTRACKED) and value is not None:
            try:
                rows.append(TrialRow.model_validate(value))
            except ValidationError:
                note(f"warning: {study.journal}: attribute {name} is damaged; the trial is not tracked")
    return sorted(rows, key=lambda row: row.number)


def note(text: str) -> None:
    """Show a line where the sweep's progress is shown."""
    (progress_of_run.get() or make_run_progress()).note(text)


def open_tracking(study: SweepStudy, config: RunConfig, *, is_ended: bool) -> SweepTracking | None:
    """Open the sweep's own tracking run, and send what an earlier sweep of the study could not."""
    if config.tracking.kind != "mlflow":
        return None
    tracker = MlflowTracker(config.tracking, folder=Path(config.output_dir))
    tracking = SweepTracking(tracker, study, config, is_ended=is_ended)
    if not tracking.send():
        note(f"warning: {tracking.outage}; the sweep continues, and its trials are sent when the server answers")
    return tracking
