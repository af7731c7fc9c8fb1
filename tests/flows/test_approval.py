"""A run that asks a person: suspended after QC, and continued by `likeness approve`."""

from typing import Any

from tests.support.cli_sandbox import CliSandbox


def test_a_run_waits_for_approval_and_goes_on_after_it(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    waiting = sandbox.run("subject.approval=ask")
    assert waiting.returncode != 0
    assert "ApprovalPending: the photos wait for approval" in waiting.stderr
    asked = sandbox.newest()
    assert asked["status"] == "pending"
    assert "training" not in asked["stages"]
    assert f"likeness approve {asked['run_id']}" in sandbox.likeness("runs").stdout

    unknown = sandbox.likeness("approve", asked["run_id"], "--reject", "none.png", "--yes")
    assert unknown.returncode == 2
    assert "there is no photo 'none.png'; there are:" in unknown.stderr
    silent = sandbox.likeness("approve", asked["run_id"])
    assert silent.returncode == 1
    assert "nothing was decided" in silent.stderr

    done = sandbox.likeness("approve", asked["run_id"], typed="y\n")
    assert done.returncode == 0, done.stderr[-3000:]
    summary = sandbox.newest()
    assert summary["status"] == "finished"
    assert all(stage["cached"] for stage in summary["stages"].values())
    assert sandbox.likeness("approve", asked["run_id"]).returncode == 2  # decided once
