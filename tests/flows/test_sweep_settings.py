"""Sweeps with whole runs: trials share stages, and are pruned."""

import json
import re

import pytest

from conf.sweep import read_sweep
from flows.runs.records import list_summaries
from flows.sweep_settings import sweep_settings
from flows.sweeps.pool import NO_POOL
from flows.sweeps.study import SweepStudy
from tasks.errors import ConfigError
from tests.support.cli_sandbox import QUICK, CliSandbox

RATE = "training.learning_rate"
pytestmark = pytest.mark.timeout(600)  # several whole runs each, two of them at once


def test_trials_share_cached_stages_and_the_best_trial_alone_is_registered(
    first_run: dict[str, object], sandbox: CliSandbox
) -> None:
    words = ["sweep", *QUICK, f"{RATE}=1e-4,3e-4", "tracking=mlflow", "--publish-best"]
    before = {summary.run_id for summary in list_summaries(sandbox.output)}
    done = sandbox.likeness(*words, timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]
    # The first value is the default, which the first run already trained; the second is new.
    # It has the latents of five photos and four class images from that run.
    shared = r"2 new trials; cached stages: subject 2, prior 2, training 1, evaluation 1\b.*; cached latents: 9 images"
    [line] = re.findall(f"^{shared}$", done.stdout, re.MULTILINE)
    assert any(f"{line}." in path.read_text() for path in sandbox.output.glob("sweeps/*/report.html"))
    assert done.stdout.count("\n* ") == 1
    runs = [summary for summary in list_summaries(sandbox.output) if summary.run_id not in before]
    # The trial that was trained drew no samples of the base model: of two prompts, and two of the class.
    assert {summary.stages["evaluation"].counts.get("shared") for summary in runs} == {4, None}
    # One vision server judged all trials.
    logs = [path.parent for path in sandbox.output.rglob("vision-server.log")]
    assert not [summary for summary in runs if sandbox.output / summary.run_id in logs]
    assert [folder for folder in logs if folder.parent == sandbox.output / "sweeps"]
    versions = [summary.registered and summary.registered.version for summary in reversed(runs)]
    assert versions[:2] == [None, None]
    assert len(versions) == 3
    assert f"\npublished likeness-fish, version {versions[2]}\n" in done.stdout
    # Only a work pool takes several at once; the embedded server has none.
    again = sandbox.embedded().likeness(*words[:-1], "--parallel", "2")
    assert "0 new trials" in again.stdout
    assert NO_POOL in again.stderr


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
    assert all({"objective", "tuned/dino"} <= set(run.data.metrics) for run in children)


def test_a_training_behind_the_median_is_stopped_at_its_first_validation(
    first_run: dict[str, object], sandbox: CliSandbox
) -> None:
    from optuna.trial import create_trial

    words = [
        *QUICK,
        "tracking=none",
        "publishing=local",
        "training.validation.validation_steps=2",
        f"{RATE}=1e-4..3e-4",
    ]
    options = {"num_trials": 4, "sampler": "random", "pruner": "median", "study": "pruned"}
    # Three trials with an unreachable validation.
    study = SweepStudy(read_sweep(words, options), sandbox.output / "sweeps", seed=23)
    for rate in (1e-4, 2e-4, 3e-4):
        study.study.add_trial(
            create_trial(
                values=[1.0], params={RATE: rate}, distributions=study.distributions, intermediate_values={2: 1e6}
            )
        )
    done = sandbox.likeness(
        "sweep", *words, "--trials", "4", "--sampler", "random", "--pruner", "median", "--study", "pruned"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trial 3 pruned: pruned at step 2: its validation is behind the median" in done.stdout
    summary = sandbox.newest()
    assert summary["status"] == "cancelled"
    training = sandbox.output / "work" / "training" / summary["stages"]["training"]["key"]
    events = [json.loads(line) for line in (training / "events.jsonl").read_text().splitlines()]
    assert max(event.get("step", 0) for event in events) < 6
    # All trials of a process share the imports of the worker.
    assert (training / "worker.log").read_text().startswith("forked by process")


def test_a_sweep_that_would_ask_a_person_is_refused_before_its_first_trial() -> None:
    request = read_sweep([f"{RATE}=1e-5,1e-4", "subject.approval=ask"], {})
    with pytest.raises(ConfigError, match="asks nobody"):
        sweep_settings.fn(request)
