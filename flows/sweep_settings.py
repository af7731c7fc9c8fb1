"""Search settings of the main job: Optuna asks, the main job answers, stages are shared.

A study is kept in `<output_dir>/sweeps/<study>.journal`, so a sweep that was stopped goes on.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import deployment

from conf.compose import compile_request
from conf.schema import RunConfig
from conf.sweep import SweepRequest
from conf.trust import allowed_roots
from flows.personalize_subject import personalize_subject
from tasks.errors import ConfigError, LikenessError
from tasks.services.tracking.mlflow_tracker import MlflowTracker


@flow(name="sweep-settings", persist_result=False)
def sweep_settings(request: SweepRequest) -> dict[str, Any]:
    """Run trials until the study has enough; name the best."""
    roots = None if deployment.id is None else allowed_roots()
    config = compile_request(request.base, roots=roots)
    study = open_study(request, Path(config.output_dir))
    num_left = count_left(study, request)
    parent = open_tracking(config, request) if num_left else None
    rows: list[dict[str, Any]] = []
    is_failed = True
    try:
        for _ in range(num_left):
            rows.append(run_trial(study, request, config, parent))
        is_failed = False
    finally:
        if parent is not None:
            parent.finish(is_failed=is_failed)
    return collect_outcome(study, request, rows)


def run_trial(study: Any, request: SweepRequest, config: RunConfig, parent: MlflowTracker | None) -> dict[str, Any]:
    """Ask for a trial's values, run the main job with them, and tell the study."""
    trial = study.ask()
    values = {key: trial.suggest_categorical(key, options) for key, options in request.space.items()}
    try:
        summary = personalize_subject(request.make_trial(values))
    except LikenessError as error:
        study.tell(trial, state=trial_state("FAIL"))
        return {"trial": trial.number, "values": values, "error": str(error)}
    value = compute_objective(summary, request.objective)
    trial.set_user_attr("run_id", summary["run_id"])
    study.tell(trial, value)
    track_trial(config, parent, summary, values, value)
    return {"trial": trial.number, "values": values, "value": value, "summary": summary}


def open_study(request: SweepRequest, output: Path) -> Any:
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
    study = optuna.create_study(
        storage=storage, study_name=request.study_name, direction="maximize", load_if_exists=True
    )
    for trial in study.get_trials(deepcopy=False, states=(trial_state("RUNNING"),)):
        study.tell(trial.number, state=trial_state("FAIL"))
    if request.is_grid:
        complete = [trial.params for trial in study.get_trials(deepcopy=False, states=(trial_state("COMPLETE"),))]
        waiting = study.get_trials(deepcopy=False, states=(trial_state("WAITING"),))
        queued = [trial.system_attrs.get("fixed_params") for trial in waiting]
        for values in request.combinations():
            if values not in complete and values not in queued:
                study.enqueue_trial(values)
    return study


def trial_state(name: str) -> Any:
    """Return Optuna's state of a name."""
    from optuna.trial import TrialState

    return TrialState[name]


def count_left(study: Any, request: SweepRequest) -> int:
    """Return how many trials the study still lacks; failed ones are tried again."""
    if request.is_grid:
        return len(study.get_trials(deepcopy=False, states=(trial_state("WAITING"),)))
    done = len(study.get_trials(deepcopy=False, states=(trial_state("COMPLETE"),)))
    return max(0, request.num_trials - done)


def compute_objective(summary: dict[str, Any], name: str) -> float:
    """Return what a trial is worth."""
    tuned = summary["metrics"]["tuned"]
    if name == "dino_x_clip_t":
        return float(tuned["dino"] * tuned["clip_t"])
    if name == "concept_preservation":
        return float(summary["scores"]["tuned"][name])
    return float(tuned[name])


def open_tracking(config: RunConfig, request: SweepRequest) -> MlflowTracker | None:
    """Open the sweep's own tracking run."""
    if config.tracking.kind != "mlflow":
        return None
    tracker = MlflowTracker(config.tracking, folder=Path(config.output_dir))
    params = {key: ", ".join(map(str, values)) for key, values in request.space.items()}
    tracker.start(name=request.study_name, params=params, tags={"likeness.kind": "sweep"})
    return tracker


def track_trial(
    config: RunConfig, parent: MlflowTracker | None, summary: dict[str, Any], values: dict[str, Any], value: float
) -> None:
    """Log one trial as a child of the sweep's tracking run."""
    if parent is None:
        return
    child = MlflowTracker(config.tracking, folder=Path(config.output_dir))
    child.parent_run_id = parent.run_id
    params = {key: str(item) for key, item in values.items()}
    child.start(name=summary["run_id"], params=params, tags={"likeness.kind": "trial"})
    metrics = [(f"tuned/{key}", float(item), 0) for key, item in summary["metrics"]["tuned"].items()]
    child.log_metrics([("objective", value, 0), *metrics])
    child.finish(is_failed=False)


def collect_outcome(study: Any, request: SweepRequest, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return trials, the best of all, and how many stages were shared."""
    complete = study.get_trials(deepcopy=False, states=(trial_state("COMPLETE"),))
    if not complete:
        reasons = "; ".join(row["error"] for row in rows if "error" in row)
        raise ConfigError(f"no trial of {request.study_name} finished: {reasons or 'see the runs'}")
    best = max(complete, key=lambda trial: trial.value)
    shared: Counter[str] = Counter()
    for row in rows:
        stages = row.get("summary", {}).get("stages", {})
        shared.update(name for name, stage in stages.items() if stage["cached"])
    return {
        "study": request.study_name,
        "objective": request.objective,
        "trials": [
            {"trial": t.number, "values": t.params, "value": t.value, "run_id": t.user_attrs.get("run_id", "")}
            for t in complete
        ],
        "best": {"trial": best.number, "values": best.params, "value": best.value,
                 "run_id": best.user_attrs.get("run_id", "")},
        "num_new_trials": len(rows),
        "shared_stages": dict(shared),
    }  # fmt: skip


def print_sweep(outcome: dict[str, Any]) -> None:
    """Print trials, best and shared stages."""
    best = outcome["best"]
    print(f"\n{outcome['study']}: {outcome['objective']}")
    for trial in sorted(outcome["trials"], key=lambda row: -row["value"]):
        values = "  ".join(f"{key}={value}" for key, value in trial["values"].items())
        mark = "*" if trial["trial"] == best["trial"] else " "
        print(f"{mark} {trial['trial']:3d}  {trial['value']:.4f}  {values}  {trial['run_id']}")
    shared = ", ".join(f"{name} {count}" for name, count in outcome["shared_stages"].items()) or "none"
    print(f"{outcome['num_new_trials']} new trials; stages taken from the store: {shared}")
