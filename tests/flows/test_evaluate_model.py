"""A model from elsewhere gets the figures that a run gives its own."""

import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.runs.records import list_summaries, read_request, suggest_next
from tasks.diffusion.hub import MINI_FOLDER
from tests.support.cli_sandbox import QUICK, ROOT, CliSandbox

DEMO = ROOT / "tasks" / "mini" / "demo_subject"


@pytest.fixture(scope="module")
def evaluated(sandbox: CliSandbox, first_run: dict[str, Any]) -> dict[str, Any]:
    """The summary of an evaluation of the first run's published model, as if another trainer had made it."""
    done = sandbox.likeness(
        "evaluate", first_run["paths"]["model"], *QUICK, "--photos", str(DEMO), "--class-noun", "fish"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "likeness compare RUN" in done.stdout
    return sandbox.newest()


def test_an_evaluated_model_has_the_metrics_of_the_run_that_trained_it(
    first_run: dict[str, Any], evaluated: dict[str, Any]
) -> None:
    assert evaluated["evaluated"]["kind"] == "pipeline"
    assert evaluated["stages"]["subject"]["key"] == first_run["stages"]["subject"]["key"]
    for side in ("base", "tuned"):
        # The same weights, prompts and seeds.
        assert evaluated["metrics"][side] == pytest.approx(first_run["metrics"][side], abs=1e-4)
    assert set(evaluated["stages"]) == {"subject", "training", "evaluation", "scoring"}
    assert evaluated["estimates"]["dino"]["gain"]["num"] == 2


def test_a_runs_summary_has_intervals_by_prompt_and_by_kind(first_run: dict[str, Any]) -> None:
    assert first_run["estimates"]["dino"]["gain"]["num"] == 2
    assert set(first_run["kinds"]) == {"scene"}
    templates = [row["template"] for row in first_run["prompts"]]
    assert templates == ["a photo of {subject}", "a photo of {subject} in the snow"]
    means = [row["values"]["dino"]["tuned"]["mean"] for row in first_run["prompts"]]
    assert sum(means) / 2 == pytest.approx(first_run["metrics"]["tuned"]["dino"], abs=1e-5)


DEPLOYED = """
import importlib, json, sys
module, _, function = sys.argv[1].rpartition(".")
parameters = json.loads(sys.argv[2])
flow = getattr(importlib.import_module(module), function)
print(flow(**flow.validate_parameters(parameters)).model_dump_json())
"""
"""As a worker runs the deployment: its entrypoint, with parameters as JSON."""


def run_deployed(sandbox: CliSandbox, model: str) -> "subprocess.CompletedProcess[str]":
    listed = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    [found] = [each for each in listed if each["name"] == "evaluate-model"]
    base = {"experiment": "smoke", "tracking": "none", "settings": {"training.num_threads": 1}}
    parameters = {**found["parameters"], "request": {"model": model, "base": base}}
    environment = {**sandbox.environment(), "PREFECT__RUNTIME__DEPLOYMENT__ID": str(uuid.uuid4())}
    return subprocess.run(
        [sys.executable, "-c", DEPLOYED, found["entrypoint"], json.dumps(parameters)], cwd=sandbox.folder,
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_a_deployment_evaluates_a_model_as_the_command_line_does_with_the_rights_of_a_request(
    sandbox: CliSandbox, first_run: dict[str, Any], evaluated: dict[str, Any]
) -> None:
    done = run_deployed(sandbox, first_run["paths"]["model"])
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["status"] == "finished"
    assert summary["evaluated"] == evaluated["evaluated"]
    assert summary["metrics"]["tuned"] == evaluated["metrics"]["tuned"]
    # The same work: nothing of it is computed again.
    assert {name: stage["cached"] for name, stage in summary["stages"].items()} == dict.fromkeys(
        summary["stages"], True
    )
    stored = read_request(sandbox.output / summary["run_id"])
    assert (stored.model, stored.is_trusted) == (first_run["paths"]["model"], False)


def test_a_deployment_evaluates_no_model_outside_the_allowed_folders(
    sandbox: CliSandbox, evaluated: dict[str, Any]
) -> None:
    before = len(list_summaries(sandbox.output))
    done = run_deployed(sandbox, str(MINI_FOLDER / "base"))  # the command line takes it
    assert done.returncode != 0
    assert "lies outside the allowed folders" in done.stderr
    assert len(list_summaries(sandbox.output)) == before


def test_an_evaluated_model_is_compared_with_a_run(
    sandbox: CliSandbox, first_run: dict[str, Any], evaluated: dict[str, Any]
) -> None:
    done = sandbox.likeness("compare", first_run["run_id"], evaluated["run_id"], "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["metrics"]["dino"]["differences"][0]["mean"] == pytest.approx(0, abs=1e-4)
    assert found["configuration"]["model"][1].endswith("/model")
    assert "training.max_train_steps" not in found["configuration"]
    assert "inconclusive" in found["conclusion"]  # two prompts


def test_the_model_of_an_evaluation_is_recorded_and_what_it_lacks_is_named(
    sandbox: CliSandbox, evaluated: dict[str, Any]
) -> None:
    folder = sandbox.output / evaluated["run_id"]
    assert read_request(folder).model.endswith("/model")
    [summary] = [each for each in list_summaries(sandbox.output) if each.run_id == evaluated["run_id"]]
    killed = summary.model_copy(update={"status": "killed"})
    assert suggest_next(killed, folder) == f"likeness resume {evaluated['run_id']}"
    done = sandbox.likeness("publish", evaluated["run_id"], "--to", "elsewhere")
    assert done.returncode == 2
    assert "evaluated a model from elsewhere: it has no publishing stage" in done.stderr


def test_an_evaluated_model_has_a_report_without_training_and_generates_images(
    sandbox: CliSandbox, first_run: dict[str, Any], evaluated: dict[str, Any]
) -> None:
    done = sandbox.likeness("report", evaluated["run_id"])
    assert done.returncode == 0, done.stderr
    page = Path(sandbox.folder, done.stdout.strip()).read_text()
    own = (sandbox.output / first_run["run_id"] / "report.html").read_text()
    for section in ("samples", "metrics", "photos", "judge", "drift", "use", "lineage"):
        assert f'<h2 id="{section}">' in page
        assert f'<h2 id="{section}">' in own
    assert '<h2 id="training">' in own
    assert '<h2 id="training">' not in page
    assert "trained elsewhere" in page
    assert f"likeness generate {evaluated['run_id']} " in page
    folder = sandbox.output / evaluated["run_id"]
    assert '<a href="model/">model folder</a>' in page
    assert (folder / "model" / "model_index.json").is_file()
    assert f"from_pretrained(&#39;{folder.absolute()}/model&#39;)" in page
    done = sandbox.likeness("generate", evaluated["run_id"], "a photo of sks fish", "--steps", "1", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "seed 3" in done.stdout


def test_a_model_that_was_tuned_on_other_photos_has_a_warning_and_a_finding(
    sandbox: CliSandbox, first_run: dict[str, Any], evaluated: dict[str, Any], tmp_path: Path
) -> None:
    assert evaluated["evaluated"]["num_unmatched_photos"] == 0
    own = (sandbox.output / evaluated["run_id"] / "report.html").read_text()
    model = tmp_path / "model"
    shutil.copytree(Path(sandbox.folder, first_run["paths"]["model"]), model)
    lineage = json.loads((model / "lineage.json").read_text())
    assert len(lineage["photos"]) == 5
    (model / "lineage.json").unlink()  # read-only, and linked
    (model / "lineage.json").write_text(json.dumps({**lineage, "photos": ["0" * 64, "1" * 64]}))
    done = sandbox.likeness("evaluate", str(model), *QUICK, "--photos", str(DEMO), "--class-noun", "fish")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "none of the photos is among the 2" in line]
    assert len(lines) == 1 and "warning:" in lines[0]
    newest = sandbox.newest()
    assert newest["evaluated"]["num_unmatched_photos"] == 2
    page = (sandbox.output / newest["run_id"] / "report.html").read_text()
    verdict = page.split('aria-label="Verdict"', 1)[1].split("</section>", 1)[0]
    assert '<li class="caution"' in verdict and "None of the photos is among the 2 that the model was tuned" in verdict
    assert "None of the photos is among" not in own


@pytest.mark.parametrize(
    ("model", "photos", "message"),
    [
        ("nowhere", "photos", "there is no model at nowhere"),
        ("model.ckpt", "photos", "is a pickle"),
        ("{published}", "no photos", "--photos: no photos is not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_before_anything_starts(
    sandbox: CliSandbox, first_run: dict[str, Any], model: str, photos: str, message: str
) -> None:
    (sandbox.folder / "photos").mkdir(exist_ok=True)
    (sandbox.folder / "model.ckpt").touch()
    before = len(list_summaries(sandbox.output))
    words = (
        "evaluate",
        model.format(published=first_run["paths"]["model"]),
        "--photos",
        photos,
        "--class-noun",
        "fish",
    )
    done = sandbox.likeness(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert len(list_summaries(sandbox.output)) == before
    assert not Path(sandbox.folder / "nowhere").exists()
