"""`likeness capacity` reads what a finished run took, and refuses runs that show nothing."""

import json
from typing import Any

import pytest

from tests.support.cli_sandbox import CliSandbox


def test_the_workload_is_what_the_run_took(sandbox: CliSandbox, first_run: dict[str, Any]) -> None:
    done = sandbox.likeness("capacity", first_run["run_id"], "gpus=2", "--subjects", "1,50", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    stages, work = first_run["stages"], found["workload"]
    assert work["on_gpu"] == pytest.approx(sum(stages[name]["seconds"] for name in ("prior", "training", "evaluation")))
    assert work["llm_calls"] + work["batch_requests"] == first_run["llm_calls"] > 0
    assert work["batch_requests"] == stages["scoring"]["counts"]["llm_calls"] > 0
    assert work["objects"] > 20
    assert work["stored_bytes"] > 1_000_000
    one, fifty = found["outcomes"]
    assert fifty["objects"] == 50 * one["objects"]
    assert fifty["seconds"] > one["seconds"]


def test_a_run_from_the_cache_is_refused(sandbox: CliSandbox, first_run: dict[str, Any]) -> None:
    done = sandbox.run()
    assert done.returncode == 0, done.stderr
    refused = sandbox.likeness("capacity", sandbox.newest()["run_id"])
    assert refused.returncode != 0
    assert "did not compute subject, prior, training" in refused.stderr
    assert first_run["run_id"] != sandbox.newest()["run_id"]


@pytest.mark.parametrize("subjects", ["0", "many", "1,-3", "99999999"])
def test_wrong_numbers_are_one_line(sandbox: CliSandbox, first_run: dict[str, Any], subjects: str) -> None:
    refused = sandbox.likeness("capacity", first_run["run_id"], "--subjects", subjects)
    assert refused.returncode != 0
    assert len(refused.stderr.splitlines()) == 1
