"""Search settings of the main job: Optuna asks, the main job answers, stages are shared.

A study is kept in `<output_dir>/sweeps/<study>.journal`, so a sweep that was stopped goes on.
"""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field

from conf.request import RunRequest, Value, compile_request, parse_overrides, split_sweep
from conf.schema import RunConfig
from flows.personalize_subject import personalize_subject
from tasks.contract import digest
from tasks.errors import ConfigError, LikenessError
from tasks.services.tracking import MlflowTracker

OBJECTIVES = ("dino_x_clip_t", "dino", "clip_i", "clip_t", "concept_preservation")


class SweepRequest(BaseModel):
    """A base request and the values to try."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: RunRequest = Field(default_factory=RunRequest, description="what every trial shares")
    space: dict[str, list[Value]] = Field(min_length=1, description="setting: the values to try")
    num_trials: int = Field(0, ge=0, description="trials in all; 0: every combination")
    study: str = Field("", pattern=r"^[A-Za-z0-9_-]*$", description="name to go on with; empty: made from the request")
    objective: Literal["dino_x_clip_t", "dino", "clip_i", "clip_t", "concept_preservation"] = Field(
        "dino_x_clip_t", description="what is maximized, of the tuned model"
    )

    @property
    def study_name(self) -> str:
        """Return the study's name: the same request goes on with the same study."""
        return self.study or f"sweep-{digest([self.base, self.space, self.objective])[:10]}"

    @property
    def num_combinations(self) -> int:
        """Return how many different trials there are."""
        return math.prod(len(values) for values in self.space.values())


def parse_sweep(words: Iterable[str], *, num_trials: int = 0, study: str = "") -> SweepRequest:
    """Turn `key=v1,v2` words into a sweep. Raises ConfigError where none has several values."""
    fixed, space = split_sweep(words)
    if not space:
        raise ConfigError("no setting has several values; give one, for example training.learning_rate=1e-5,3e-5")
    request = SweepRequest(base=parse_overrides(fixed), space=space, num_trials=num_trials, study=study)
    for trial in ({k: v[0] for k, v in space.items()}, {k: v[-1] for k, v in space.items()}):
        compile_request(make_trial(request.base, trial))
    return request


def make_trial(base: RunRequest, values: dict[str, Any]) -> RunRequest:
    """Return the request of one trial."""
    return base.model_copy(update={"settings": {**base.settings, **values}})


@flow(name="sweep-settings", persist_result=False)
def sweep_settings(request: SweepRequest) -> dict[str, Any]:
    """Run trials until the study has enough; name the best."""
    config = compile_request(request.base)
    study = open_study(request, Path(config.output_dir))
    parent = open_tracking(config, request)
    total = min(request.num_trials or request.num_combinations, request.num_combinations)
    rows: list[dict[str, Any]] = []
    while count_done(study) < total:
        trial = study.ask()
        values = {key: trial.suggest_categorical(key, options) for key, options in request.space.items()}
        try:
            summary = personalize_subject(make_trial(request.base, values))
        except LikenessError as error:
            study.tell(trial, state=trial_state("FAIL"))
            rows.append({"trial": trial.number, "values": values, "error": str(error)})
            continue
        value = compute_objective(summary, request.objective)
        trial.set_user_attr("run_id", summary["run_id"])
        study.tell(trial, value)
        track_trial(config, parent, summary, values, value)
        rows.append({"trial": trial.number, "values": values, "value": value, "summary": summary})
    if parent is not None:
        parent.finish(is_failed=False)
    return collect_outcome(study, request, rows)


def open_study(request: SweepRequest, output: Path) -> Any:
    """Return the persistent study; trials that an earlier process left running count as failed."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = output / "sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(folder / f"{request.study_name}.journal")))
    is_grid = not request.num_trials or request.num_trials >= request.num_combinations
    space: Any = request.space
    sampler = optuna.samplers.GridSampler(space, seed=0) if is_grid else optuna.samplers.TPESampler()
    study = optuna.create_study(
        storage=storage, study_name=request.study_name, sampler=sampler, direction="maximize", load_if_exists=True
    )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def trial_state(name: str) -> Any:
    """Return Optuna's state of a name."""
    from optuna.trial import TrialState

    return TrialState[name]


def count_done(study: Any) -> int:
    """Return how many trials ended, well or badly, in this study."""
    return len(study.get_trials(deepcopy=False, states=(trial_state("COMPLETE"), trial_state("FAIL"))))


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
