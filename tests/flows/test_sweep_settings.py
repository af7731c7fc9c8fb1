"""A sweep: trials share what they don't change, and a stopped study goes on."""

import pytest
from pydantic import ValidationError

from conf.request import Value
from conf.sweep import SweepRequest, parse_sweep
from flows.sweep_settings import compute_objective
from tasks.errors import ConfigError
from tasks.manifests.run_summary import RunSummary
from tasks.manifests.scoring import SideScores
from tests.support.cli_sandbox import QUICK, CliSandbox


def test_trials_share_cached_stages_and_the_best_trial_is_marked(
    first_run: dict[str, object], sandbox: CliSandbox
) -> None:
    words = ["sweep", *QUICK, "training.learning_rate=1e-4,3e-4", "tracking=mlflow"]
    done = sandbox.likeness(*words, timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]
    # The first value is the default, which the first run already trained; the second is new.
    assert "2 new trials; cached stages: subject 2, prior 2, training 1, evaluation 1" in done.stdout
    assert done.stdout.count("\n* ") == 1
    again = sandbox.likeness(*words)
    assert "0 new trials" in again.stdout


def test_parent_and_child_runs_are_tracked(first_run: dict[str, object], sandbox: CliSandbox) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{sandbox.output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("likeness")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id for run in runs if run.data.tags.get("likeness.kind") == "sweep"}
    children = [run for run in runs if run.data.tags.get("likeness.kind") == "trial"]
    assert len(children) == 2
    assert all(run.data.tags["mlflow.parentRunId"] in parents for run in children)


def test_a_sweep_without_a_multi_valued_setting_is_rejected() -> None:
    with pytest.raises(ConfigError, match="no setting has several values"):
        parse_sweep(["training.learning_rate=1e-5"])


def test_every_sweep_value_is_validated_before_the_first_trial() -> None:
    with pytest.raises(ConfigError, match="greater than 0"):
        parse_sweep(["training.learning_rate=1e-5,-1,1e-4"])
    with pytest.raises(ConfigError, match="did you mean training.learning_rate"):
        parse_sweep(["training.lerning_rate=1e-5,1e-4"])


def test_equal_sweeps_have_the_same_study_name() -> None:
    words = ["training.learning_rate=1e-5,1e-4"]
    assert parse_sweep(words).study_name == parse_sweep(words).study_name
    assert parse_sweep(words).study_name != parse_sweep(["seed=1,2"]).study_name


def test_objectives_are_read_from_the_summary() -> None:
    scores = SideScores(concept_preservation=3.0, prompt_following=4.0, image_quality=4.0)
    metrics = {"tuned": {"dino": 0.5, "clip_t": 0.4, "clip_i": 0.7}}
    summary = RunSummary(run_id="r", status="finished", metrics=metrics, scores={"tuned": scores})
    assert compute_objective(summary, "dino_x_clip_t") == pytest.approx(0.2)
    assert compute_objective(summary, "concept_preservation") == 3.0
    assert compute_objective(summary, "clip_i") == 0.7


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"evil\x1b[31m key": [1]}, "is not a dotted name of a setting"),
        ({"training.prompt": ["x" * 10_000]}, "10,000 characters, at most 4,000"),
        ({"training.prompt": ["a\x1b[31m"]}, "control characters are not accepted"),
        ({"seed": []}, "0 values to try"),
        ({f"a{number}": list(range(100)) for number in range(4)}, "100,000,000 combinations, at most 1,000"),
    ],
)
def test_an_invalid_or_oversized_search_space_is_rejected_before_enumeration(
    space: dict[str, list[Value]], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        SweepRequest(space=space)
