"""Optuna's dashboard opens the study of a sweep with the command that the terminal and the report show."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from conf.request import RunRequest
from flows.cli.run.sweep import print_sweep
from flows.sweeps.outcome import SweepOutcome
from tasks.errors import TrainingFailed
from tasks.manifests.run_summary import RunSummary
from tests.servers.served import find_port, serving
from tests.support.sweep import RATE, VALIDATED, Trainings, sweep, sweep_request

REASON = "not finite: <b>lower the rate"
SETTINGS = {"0": "0.1", "1": "0.11", "2": "0.12", "3": "0.5", "4": "0.9"}
"""The learning rate by trial: the fourth fails, the fifth is behind the median."""


class Failing(Trainings):
    """Trainings of which one fails."""

    def __call__(self, request: RunRequest) -> RunSummary:
        if request.settings[RATE] == 0.5:
            raise TrainingFailed(REASON)
        return super().__call__(request)


@pytest.fixture
def outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepOutcome:
    """A sweep in a folder whose name has a space."""
    monkeypatch.setattr("flows.sweep_settings.draw_plots", lambda study: [])
    words = (f"{RATE}={','.join(SETTINGS.values())}", VALIDATED)
    return sweep(sweep_request(tmp_path / "my runs", *words, pruner="median", objectives=["dino"]), Failing())


@contextmanager
def dashboard(command: str, log: Path) -> Iterator[httpx.Client]:
    """Run the command on a port of its own, and yield a client of its API."""
    name, *words = shlex.split(command)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    program = shutil.which(name, path=path) or pytest.skip(f"{name} is not installed: pip install optuna-dashboard")
    port = find_port()
    url = f"http://127.0.0.1:{port}"
    with (
        serving([program, *words, "--port", str(port)], ready=f"{url}/api/meta", log=log),
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        yield client


def read_attributes(found: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: each["value"] for each in found["user_attrs"]}


def check_study(client: httpx.Client, outcome: SweepOutcome) -> None:
    """The study has all trials, with parameters, states, values and what the sweep noted of each."""
    [study] = client.get("/api/studies").raise_for_status().json()["study_summaries"]
    assert (study["study_name"], study["directions"]) == (outcome.study, ["maximize"])
    identity = json.loads(read_attributes(study)["likeness"])
    assert (identity["objectives"], identity["num_seeds"]) == (outcome.objectives, 1)
    detail = client.get(f"/api/studies/{study['study_id']}").raise_for_status().json()
    trials = {str(trial["number"]): trial for trial in detail["trials"]}
    states = {number: trial["state"] for number, trial in trials.items()}
    assert states == {"0": "Complete", "1": "Complete", "2": "Complete", "3": "Fail", "4": "Pruned"}
    parameters = {
        number: {each["name"]: each["param_external_value"] for each in trial["params"]}
        for number, trial in trials.items()
    }
    assert parameters == {number: {RATE: rate} for number, rate in SETTINGS.items()}
    assert [trials[str(number)]["values"] for number in range(3)] == [[0.1], [0.11], [0.12]]
    assert [best["number"] for best in detail["best_trials"]] == [2]
    attributes = {number: read_attributes(trial) for number, trial in trials.items()}
    assert json.loads(attributes["2"]["runs"]) == ["run-3"]
    assert json.loads(attributes["2"]["settings"]) == {RATE: 0.12}
    assert json.loads(attributes["2"]["cached_stages"]) == {"prior": 1, "training": 0}
    assert attributes["2"]["cost_usd"] == "0.25"
    assert "error" not in attributes["2"]
    assert attributes["3"]["error"] == REASON
    assert attributes["4"]["error"].startswith("pruned at step 2")
    # A loss, negated where the objective is maximized.
    assert trials["4"]["intermediate_values"] == [{"step": 2, "value": -0.9}]


def test_the_command_of_the_terminal_opens_the_study(
    outcome: SweepOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    print_sweep(outcome)
    [command] = re.findall(r"^study +(.*)$", capsys.readouterr().out, re.MULTILINE)
    with dashboard(command, tmp_path / "log") as client:
        check_study(client, outcome)


def test_the_command_of_the_report_opens_the_study_in_its_folder(
    outcome: SweepOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [command] = re.findall(r"<pre>(optuna-dashboard .*)</pre>", Path(outcome.report).read_text())
    monkeypatch.chdir(Path(outcome.journal).parent)
    with dashboard(command, tmp_path / "log") as client:
        check_study(client, outcome)
