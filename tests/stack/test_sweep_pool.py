"""A sweep on a work pool: trials run at once, and a killed sweep finds its runs again."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cli_sandbox import LIKENESS, QUICK, ROOT, CliSandbox, end, serve_prefect
from tests.support.prefect_api import wait_for_type

RATE = "training.learning_rate"
pytestmark = pytest.mark.timeout(600)  # several whole runs, two of them at once


@pytest.fixture(scope="module")
def pool(
    sandbox: CliSandbox, first_run: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CliSandbox]:
    """The sandbox with a server of its own, which has the deployment and a worker."""
    folder = tmp_path_factory.mktemp("pool")
    with serve_prefect(folder) as url, (folder / "worker.log").open("wb") as log:
        place = replace(sandbox, server_url=url)
        environment = {**place.environment(), "PREFECT_HOME": str(folder / "prefect"), "LIKENESS_HOME": str(ROOT)}
        environment["PREFECT_WORKER_QUERY_SECONDS"] = "1"
        prefect = [sys.executable, "-m", "prefect"]
        file = ["--prefect-file", "deployments/prefect.yaml"]
        for words in (
            ["work-pool", "create", "likeness", "--type", "process"],
            ["--no-prompt", "deploy", "--name", "personalize-subject", *file],
            ["--no-prompt", "deploy", "--name", "sweep-settings", *file],
        ):
            subprocess.run([*prefect, *words], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
        worker = subprocess.Popen(
            [*prefect, "worker", "start", "--pool", "likeness"],
            cwd=place.folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            yield place
        finally:
            end(worker, seconds=5)


def list_sub_runs(place: CliSandbox) -> list[dict[str, Any]]:
    """Return the runs of the main job on the server of a sandbox."""
    body = json.dumps({"flows": {"name": {"any_": ["personalize-subject"]}}}).encode()
    request = urllib.request.Request(f"{place.server_url}/flow_runs/filter", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        found: list[dict[str, Any]] = json.loads(response.read())
    return found


def wait_until(condition: Callable[[], bool], *, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


def test_trials_on_a_work_pool_run_at_once_and_a_killed_sweep_finds_them_again(
    pool: CliSandbox, tmp_path: Path
) -> None:
    # Trained by the sweep above, where it ran.
    words = ["sweep", *QUICK, f"{RATE}=1e-4,3e-4", "publishing=local", "--study", "pooled", "--parallel", "2"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        killed = subprocess.Popen(
            [*LIKENESS, *words], cwd=pool.folder, env=pool.environment(), stdout=file, stderr=file
        )
        # The study names a trial's process before its run is sent.
        wait_until(lambda: len(list_sub_runs(pool)) == 2, seconds=120, log=log)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    done = pool.likeness(*words, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 new trials" in done.stdout
    assert done.stdout.count("interrupted") == 2
    runs = list_sub_runs(pool)
    assert [run["state"]["type"] for run in runs] == ["COMPLETED", "COMPLETED"]  # these two, not two more
    starts, ends = ([datetime.fromisoformat(run[name]) for run in runs] for name in ("start_time", "end_time"))
    assert max(starts) < min(ends)
    check_tracked(pool, "pooled")


def check_tracked(place: CliSandbox, study: str) -> None:
    """Check that the trials are children of the sweep's tracking run, as those of a local sweep are."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place.output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("likeness")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id for run in runs if run.info.run_name == study}
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") in parents]
    assert [run.data.tags["likeness.kind"] for run in children] == ["trial", "trial"]
    assert all(RATE in run.data.params and "objective" in run.data.metrics for run in children)


@pytest.mark.parametrize("num_sweeps", [1, 2])
def test_deployed_sweeps_that_hold_all_slots_of_their_pool_end(pool: CliSandbox, num_sweeps: int) -> None:
    with httpx.Client(base_url=str(pool.server_url), timeout=60, trust_env=False) as client:
        client.patch("/work_pools/likeness", json={"concurrency_limit": num_sweeps}).raise_for_status()
        deployment = client.get("/deployments/name/sweep-settings/sweep-settings").raise_for_status().json()
        # Trained by the sweep above.
        settings = {"output_dir": str(pool.output), "training.num_threads": 1}
        base = {"experiment": "smoke", "publishing": "local", "tracking": "none", "settings": settings}
        runs = []
        for number in range(num_sweeps):
            study = f"deployed-{num_sweeps}-{number}"
            request = {"space": {RATE: [1e-4, 3e-4]}, "num_parallel": 2, "study": study, "base": base}
            body = {"parameters": {"request": request}, "state": {"type": "SCHEDULED"}}
            place = f"/deployments/{deployment['id']}/create_flow_run"
            runs.append(str(client.post(place, json=body).raise_for_status().json()["id"]))
        ended = [wait_for_type(client, run, "COMPLETED", "FAILED", "CRASHED", seconds=280) for run in runs]
        assert [run["state_type"] for run in ended] == ["COMPLETED"] * num_sweeps, ended
        lines = [log["message"] for run in runs for log in read_logs(client, run)]
    assert any(f"sweeps hold all {num_sweeps} slots of the pool likeness" in line for line in lines), lines


def read_logs(client: httpx.Client, run: str) -> list[dict[str, Any]]:
    found = client.post("/logs/filter", json={"logs": {"flow_run_id": {"any_": [run]}}}).raise_for_status().json()
    return list(found)
