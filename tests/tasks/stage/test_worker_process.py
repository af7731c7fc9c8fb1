"""Child processes end with their parent, from their first instruction on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.stage.worker_process import LIFELINE_NAME, LIFELINE_PREFIX, remove_stale_lifelines, share_cores
from tests.support.cli_sandbox import ROOT

PARENT = """
import subprocess, sys, time
from tasks.stage.worker_process import child_environment, guarded
environment = child_environment()
environment["PYTHONPATH"] += ":" + sys.argv[1]
command = guarded(*sys.argv[2:])
child = subprocess.Popen(command, env=environment, start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_threads_sleep_while_they_wait_unless_a_person_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_command_line_lets_threads_sleep_before_torch_reads_the_policy() -> None:
    code = "import os, sys; from flows.cli.main import main; main(['--help']); print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"  # noqa: E501
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "PASSIVE False"


def start_parent(folder: Path, *command: str) -> tuple["subprocess.Popen[str]", psutil.Process]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    return parent, psutil.Process(int(parent.stdout.readline()))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize("is_polite", [True, False])
def test_a_child_that_is_still_importing_exits_when_its_parent_is_killed(tmp_path: Path, is_polite: bool) -> None:
    # An import that takes a minute; a child that minds no request to end has to go all the same.
    (tmp_path / "slow_module.py").write_text(
        "import pathlib, signal, sys, time\n"
        + ("" if is_polite else "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n")
        + "pathlib.Path(sys.argv[1]).touch()\nfor _ in range(600): time.sleep(0.1)\n"
    )
    begun = tmp_path / "begun"
    parent, child = start_parent(tmp_path, "slow_module", str(begun))
    wait_for(begun)
    assert child.is_running()
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert alive == []


def test_a_child_whose_parent_is_gone_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "touching.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).touch()\n")
    lifeline = tmp_path / "lifeline"
    os.mkfifo(lifeline)  # nobody holds its writing end
    for path in (lifeline, tmp_path / "missing"):
        environment = {**os.environ, "LIKENESS_LIFELINE": str(path), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
        command = [sys.executable, "-m", "tasks.stage.guard", "touching", str(tmp_path / "touched")]
        assert subprocess.run(command, env=environment, check=False).returncode == 76
    assert not (tmp_path / "touched").exists()


def test_a_guarded_module_runs_like_python_m(tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text("import sys; print(__name__, sys.argv[1:]); sys.exit(3)\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-m", "tasks.stage.guard", "ending", "a", "--b"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (3, "__main__ ['a', '--b']")


def test_a_folder_named_like_our_package_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('foreign code')\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "ending.py").write_text("import tasks; print(tasks.__file__)\n")
    code = (
        "import subprocess, sys; from tasks.stage.worker_process import child_environment, guarded\n"
        "environment = child_environment(); environment['PYTHONPATH'] += ':' + sys.argv[2]\n"
        "subprocess.run(guarded('ending'), env=environment, cwd=sys.argv[1], check=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "tasks" / "__init__.py"), done.stderr


def test_what_only_looks_like_a_lifeline_is_left_alone(tmp_path: Path) -> None:
    for name in ("a file", "more files", "a link"):
        (tmp_path / f"{LIFELINE_PREFIX}{name}").mkdir()
    (tmp_path / f"{LIFELINE_PREFIX}a file" / LIFELINE_NAME).touch()
    os.mkfifo(tmp_path / f"{LIFELINE_PREFIX}more files" / LIFELINE_NAME)
    (tmp_path / f"{LIFELINE_PREFIX}more files" / "thesis.tex").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / f"{LIFELINE_PREFIX}a link" / LIFELINE_NAME).symlink_to(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    remove_stale_lifelines(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_next_start_removes_the_lifelines_of_killed_processes_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "idle.py").write_text("import time; time.sleep(600)\n")
    killed, _ = start_parent(tmp_path, "idle")
    living, _ = start_parent(tmp_path, "idle")
    before = set(tmp_path.glob("likeness-*"))
    assert len(before) == 2
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    (tmp_path / "likeness-0").mkdir()  # locks of GPUs lie in such a folder
    started, _ = start_parent(tmp_path, "idle")
    after = set(tmp_path.glob("likeness-*")) - {tmp_path / "likeness-0"}
    assert len(after & before) == 1
    assert len(after) == 2
    for process in (living, started):
        process.kill()
        process.communicate()
