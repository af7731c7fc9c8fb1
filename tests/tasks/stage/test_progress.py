"""Progress does not end a run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli_sandbox import ROOT

CODE = """
import sys
from pathlib import Path
from tasks.stage.progress import make_progress, outlive_reader
if sys.argv[2] == "outlive":
    outlive_reader()
print("begun", file=sys.stderr, flush=True)
sys.stdin.readline()
progress = make_progress()
for index in range(3):
    progress.note(f"note {index}")
    print("result", flush=True)
print("library", file=sys.stderr)
Path(sys.argv[1]).touch()
"""

LOGGED = """
import logging
import sys
from pathlib import Path
from prefect.logging.handlers import PrefectConsoleHandler
from tasks.stage.progress import outlive_reader
log = logging.getLogger("prefect.flow_runs")
log.addHandler(PrefectConsoleHandler())  # as Prefect sets it up, before any flow begins
if sys.argv[2] == "outlive":
    outlive_reader()
print("begun", file=sys.stderr, flush=True)
sys.stdin.readline()
log.warning("first")
log.warning("second")
Path(sys.argv[1]).touch()
"""


@pytest.mark.parametrize("how", ["outlive", "plain"])
@pytest.mark.parametrize("code", [CODE, LOGGED], ids=["progress", "log of Prefect"])
def test_a_run_outlives_whoever_reads_its_output(tmp_path: Path, code: str, how: str) -> None:
    done = tmp_path / "done"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(done), how], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    process.wait(60)
    # Without it, the first line of progress ends the process: that is what a killed worker does to its runs.
    assert done.exists() == (how == "outlive")
