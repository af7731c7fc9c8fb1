"""A short campaign of faults against one run on a local stack with two workers; `make chaos` runs longer ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from flows.runs.records import list_summaries
from tests.stack.commands import ROOT, environment

SECONDS = 1200
FAULTS = ("s3-503", "machine", "prefect")


@pytest.mark.timeout(SECONDS)
def test_a_run_survives_a_short_campaign_of_faults_without_a_violation(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tests.chaos", "--seed", "4", "--runs", "1", "--workers", "2", "--variants", "1",
        "--steps", "30", "--places", "s3", "--faults", str(len(FAULTS)), "--kinds", ",".join(FAULTS),
        "--patience", "240", "--out", str(tmp_path / "site"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 violations of invariants" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert rows, done.stderr  # at least one fault hit a run
    assert "not recovered" not in done.stdout
    assert [row for row in rows if row.startswith("| machine lost | 1 | 1 |")], done.stdout + done.stderr
    assert "1 rescheduled" in done.stdout  # after the last fault before its missing heartbeats were noticed
    # Another worker continued the training from the store: the folder of the first one's was gone.
    trained = [summary.stages.get("training") for summary in list_summaries(tmp_path / "site" / "place-0")]
    steps = [stage.counts["resumed_from_step"] for stage in trained if stage and stage.counts and not stage.cached]
    assert len(steps) == 1
    assert steps[0] > 0
