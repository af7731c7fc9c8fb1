"""Search settings of the main job with Optuna; trials share cached stages.

A study is stored in `<output_dir>/sweeps/<study>.journal`, so an interrupted sweep resumes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.runtime import deployment
from pydantic import BaseModel

from conf.compose import compile_request
from conf.request import Value
from conf.schema import RunConfig
from conf.sweep import SweepRequest
from conf.trust import allowed_roots
from flows.personalize_subject import personalize_subject
from tasks.errors import ConfigError, LikenessError
from tasks.manifests.run_summary import RunSummary
from tasks.services.tracking.mlflow_tracker import MlflowTracker

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import TrialState


class TrialResult(BaseModel):
    """One complete trial."""

    trial: int
    values: dict[str, Value]
    value: float
    run_id: str


class SweepOutcome(BaseModel):
    """The trials of a study, the best of all, and how many stages this sweep's runs shared."""

    study: str
    objective: str
    trials: list[TrialResult]
    best: TrialResult
    num_new_trials: int
    shared_stages: dict[str, int]


@dataclass(frozen=True)
class Sweep:
    """A running study."""

    study: "Study"
    """Optuna's, which is imported late."""
    request: SweepRequest
    config: RunConfig
    tracker: MlflowTracker | None
    """The sweep's own tracking run, the parent of its trials'."""


@flow(name="sweep-settings", persist_result=False)
def sweep_settings(request: SweepRequest) -> SweepOutcome:
    """Run the study's remaining trials and return all results with the best one."""
    roots = None if deployment.id is None else allowed_roots()
    config = compile_request(request.base, roots=roots)
    study = open_study(request, Path(config.output_dir))
    num_left = count_left(study, request)
    sweep = Sweep(study, request, config, open_tracking(config, request) if num_left else None)
    finished: list[RunSummary] = []
    errors: list[str] = []
    is_failed = True
    try:
        for _ in range(num_left):
            outcome = run_trial(sweep)
            if isinstance(outcome, RunSummary):
                finished.append(outcome)
            else:
                errors.append(outcome)
        is_failed = False
    finally:
        if sweep.tracker is not None:
            sweep.tracker.finish(is_failed=is_failed)
    return collect_outcome(sweep, finished, errors)


def run_trial(sweep: Sweep) -> RunSummary | str:
    """Run the main job with a trial's values and report its objective to the study; return what failed instead."""
    # Takes a queued trial where there is one, and samples otherwise.
    trial = sweep.study.ask()
    # Optuna takes lists as categories too, which its types leave out.
    space: dict[str, Any] = dict(sweep.request.space)
    values: dict[str, Value] = {key: trial.suggest_categorical(key, options) for key, options in space.items()}
    try:
        summary = personalize_subject(sweep.request.make_trial(values))
    # Anything else ends the sweep; its trial stays RUNNING until `open_study` marks it as failed.
    except LikenessError as error:
        sweep.study.tell(trial, state=trial_state("FAIL"))
        return str(error)
    value = compute_objective(summary, sweep.request.objective)
    # Before `tell`: a finished trial can't be updated.
    trial.set_user_attr("run_id", summary.run_id)
    sweep.study.tell(trial, value)
    track_trial(sweep, summary, TrialResult(trial=trial.number, values=values, value=value, run_id=summary.run_id))
    return summary


def open_study(request: SweepRequest, output: Path) -> "Study":
    """Return the persistent study; trials that an earlier process left running count as failed.

    A grid's missing combinations are queued: Optuna's own grid sampler stops the study, which only
    works inside its `optimize`.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = output / "sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(folder / f"{request.study_name}.journal")))
    # A journal file, not SQLite: its appends are safe on network file systems.
    study = optuna.create_study(
        storage=storage, study_name=request.study_name, direction="maximize", load_if_exists=True
    )
    # One process works on a study at a time, so a trial that is still RUNNING belongs to one that died.
    for trial in study.get_trials(deepcopy=False, states=(trial_state("RUNNING"),)):
        study.tell(trial.number, state=trial_state("FAIL"))
    if request.is_grid:
        complete = [trial.params for trial in study.get_trials(deepcopy=False, states=(trial_state("COMPLETE"),))]
        waiting = study.get_trials(deepcopy=False, states=(trial_state("WAITING"),))
        # `enqueue_trial` keeps the values here; a waiting trial has no `params` yet.
        queued = [trial.system_attrs.get("fixed_params") for trial in waiting]
        for values in request.combinations():
            if values not in complete and values not in queued:
                study.enqueue_trial(values)
    return study


def trial_state(name: str) -> "TrialState":
    """Return Optuna's trial state by name."""
    from optuna.trial import TrialState

    return TrialState[name]


def count_left(study: "Study", request: SweepRequest) -> int:
    """Return the number of remaining trials; failed ones are repeated."""
    if request.is_grid:
        # `open_study` has queued each combination that is not complete.
        return len(study.get_trials(deepcopy=False, states=(trial_state("WAITING"),)))
    done = len(study.get_trials(deepcopy=False, states=(trial_state("COMPLETE"),)))
    return max(0, request.num_trials - done)


def compute_objective(summary: RunSummary, name: str) -> float:
    """Return the value that the study maximizes."""
    tuned = summary.metrics["tuned"]

    def metric(key: str) -> float:
        value = tuned[key]
        if value is None:
            raise ConfigError(f"the sweep's objective needs {key}, which was not measured")
        return value

    if name == "dino_x_clip_t":
        return metric("dino") * metric("clip_t")
    if name == "concept_preservation":
        return summary.scores["tuned"].concept_preservation
    return metric(name)


def open_tracking(config: RunConfig, request: SweepRequest) -> MlflowTracker | None:
    """Open the sweep's own tracking run."""
    if config.tracking.kind != "mlflow":
        return None
    tracker = MlflowTracker(config.tracking, folder=Path(config.output_dir))
    params = {key: ", ".join(map(str, values)) for key, values in request.space.items()}
    tracker.start(name=request.study_name, params=params, tags={"likeness.kind": "sweep"})
    return tracker


def track_trial(sweep: Sweep, summary: RunSummary, result: TrialResult) -> None:
    """Log one trial as a child of the sweep's tracking run."""
    if sweep.tracker is None:
        return
    child = MlflowTracker(sweep.config.tracking, folder=Path(sweep.config.output_dir))
    child.parent_run_id = sweep.tracker.run_id
    params = {key: str(item) for key, item in result.values.items()}
    child.start(name=summary.run_id, params=params, tags={"likeness.kind": "trial"})
    tuned = {key: value for key, value in summary.metrics["tuned"].items() if value is not None}
    child.log_metrics([("objective", result.value, 0), *((f"tuned/{key}", value, 0) for key, value in tuned.items())])
    child.finish(is_failed=False)


def collect_outcome(sweep: Sweep, finished: Sequence[RunSummary], errors: Sequence[str]) -> SweepOutcome:
    """Return trials, the best of all, and how many stages were shared. Raises ConfigError where no trial finished."""
    request = sweep.request
    complete = [
        TrialResult(trial=t.number, values=t.params, value=t.value, run_id=t.user_attrs.get("run_id", ""))
        for t in sweep.study.get_trials(deepcopy=False, states=(trial_state("COMPLETE"),))
    ]
    if not complete:
        raise ConfigError(f"no trial of {request.study_name} finished: {'; '.join(errors) or 'see the runs'}")
    shared = Counter(name for summary in finished for name, stage in summary.stages.items() if stage.cached)
    return SweepOutcome(
        study=request.study_name,
        objective=request.objective,
        trials=complete,
        best=max(complete, key=lambda trial: trial.value),
        num_new_trials=len(finished) + len(errors),
        shared_stages=dict(shared),
    )


def print_sweep(outcome: SweepOutcome) -> None:
    """Print trials, best first, and shared stages."""
    print(f"\n{outcome.study}: {outcome.objective}")
    for trial in sorted(outcome.trials, key=lambda trial: -trial.value):
        values = "  ".join(f"{key}={value}" for key, value in trial.values.items())
        marker = "*" if trial.trial == outcome.best.trial else " "
        print(f"{marker} {trial.trial:3d}  {trial.value:.4f}  {values}  {trial.run_id}")
    shared = ", ".join(f"{name} {count}" for name, count in outcome.shared_stages.items()) or "none"
    print(f"{outcome.num_new_trials} new trials; cached stages: {shared}")
