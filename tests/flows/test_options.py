"""Options that only a whole run shows: without its option a test here fails."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from flows.runs.records import list_summaries, read_run
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.subject import SubjectSet
from tasks.stage.digests import DIGEST_FIELD
from tasks.training.data.holdout import resolve_validation
from tasks.training.inputs import TrainingInputs
from tests.support.cli_sandbox import CliSandbox


@pytest.fixture(scope="module")
def changed(sandbox: CliSandbox, first_run: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run into another folder, several options changed."""
    done = sandbox.run(
        "output_dir=elsewhere", "seed=24", "subject.identifier_token=zwx", "prior.class_prompt=one {class_noun}",
        "publishing.title=Our own title", "tracking.experiment=a study", "tracking.registered_model=our-model",
        "publishing.is_promoted=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [summary] = list_summaries(sandbox.folder / "elsewhere")
    return summary.model_dump(mode="json")


def without_digest(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name != DIGEST_FIELD}


def read_manifest(summary: dict[str, Any], stage: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(summary["paths"]["manifests"][stage]).read_text())
    return loaded


def test_a_run_writes_into_the_configured_folder(sandbox: CliSandbox, changed: dict[str, Any]) -> None:
    assert (sandbox.folder / "elsewhere" / changed["run_id"] / "report.html").is_file()
    assert (sandbox.folder / "elsewhere" / "store").is_dir()


def test_prompts_contain_the_configured_token_and_class_prompt(changed: dict[str, Any]) -> None:
    prompts = [image["instance_prompt"] for image in read_manifest(changed, "subject")["images"]]
    assert prompts
    assert all("zwx" in prompt for prompt in prompts)
    assert read_manifest(changed, "prior")["class_prompt"].startswith("one ")


def test_the_seed_changes_the_training_key(sandbox: CliSandbox, changed: dict[str, Any]) -> None:
    config = read_run(sandbox.folder / "elsewhere" / changed["run_id"]).config

    def compute_key(seed: int) -> str:
        subject = SubjectSet.model_validate(without_digest(read_manifest(changed, "subject")))
        prior = ClassImageSet.model_validate(without_digest(read_manifest(changed, "prior")))
        resolved = resolve_validation(config.training, len(subject.images), lambda note: None)
        encoders = config.evaluation.encoders
        return TrainingInputs(resolved, config.diffusion, encoders, seed, subject, prior).stage().key

    assert changed["stages"]["training"]["key"] == compute_key(24) != compute_key(23)


def test_the_report_has_the_configured_title(sandbox: CliSandbox, changed: dict[str, Any]) -> None:
    report = (sandbox.folder / "elsewhere" / changed["run_id"] / "report.html").read_text()
    assert "Our own title" in report


def test_the_model_is_registered_under_the_configured_name(sandbox: CliSandbox, changed: dict[str, Any]) -> None:
    [database] = (sandbox.folder / "elsewhere").glob("mlflow.db")
    with sqlite3.connect(database) as connection:
        models = {name for (name,) in connection.execute("select name from registered_models")}
        experiments = {name for (name,) in connection.execute("select name from experiments")}
    assert "our-model" in models
    assert "a study" in experiments


def test_the_gate_is_asked_unless_is_promoted_is_false(first_run: dict[str, Any], changed: dict[str, Any]) -> None:
    assert "too few prompts" in first_run["registered"]["blockers"][0]  # two prompts have no interval
    assert changed["registered"]["version"] is not None
    assert changed["registered"]["blockers"] == []


def test_no_model_is_registered_if_is_registered_is_false(sandbox: CliSandbox, first_run: dict[str, Any]) -> None:
    assert read_manifest(first_run, "publishing")["registered_version"] is not None
    done = sandbox.run("publishing.is_registered=false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_manifest(sandbox.newest(), "publishing")["registered_version"] is None
