"""A short campaign of faults against one run on a local stack with two workers; `make chaos` runs longer ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stack.commands import ROOT, environment

SECONDS = 1200
FAULTS = ("flow", "s3-503", "prefect")


@pytest.mark.skipif("LIKENESS_CHAOS" not in os.environ, reason="takes ten minutes; run by make chaos")
@pytest.mark.timeout(SECONDS)
def test_a_run_survives_a_short_campaign_of_faults_without_a_violation(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tests.chaos", "--seed", "3", "--runs", "1", "--workers", "2", "--variants", "1",
        "--faults", str(len(FAULTS)), "--kinds", ",".join(FAULTS), "--out", str(tmp_path / "site"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 violations of invariants" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert rows, done.stderr  # at least one fault hit a run
    assert "not recovered" not in done.stdout
