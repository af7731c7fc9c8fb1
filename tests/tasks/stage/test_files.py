"""Files that exist whole or not at all."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.errors import StorageFull
from tasks.stage.files import OWNED_PART, remove_stale_parts, staged_file, write_atomic
from tests.support.cli_sandbox import ROOT


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail() -> None:
        with staged_file(path) as staged:
            staged.write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_one_line_error_with_path_and_size(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from tasks.stage.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from tasks.errors import StorageFull\n"
        "try: write_atomic(Path(sys.argv[1]), b'x' * 5_000_000)\n"
        "except StorageFull as error: print(error)\n"
    )
    path = tmp_path / "big"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "no room left: 5.0 MB for " in done.stdout
    assert str(path) in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
    assert issubclass(StorageFull, Exception)


WRITER = """
import sys, time
from pathlib import Path
from tasks.stage.files import staged_file
with staged_file(Path(sys.argv[1]) / "a.json"):
    print(flush=True)
    time.sleep(600)
"""


def test_the_next_start_removes_the_temporary_files_of_killed_processes_and_no_others(tmp_path: Path) -> None:
    writers = {
        name: subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / name)], stdout=subprocess.PIPE)
        for name in ("killed", "living")
    }
    for writer in writers.values():
        assert writer.stdout is not None
        writer.stdout.readline()
    writers["killed"].kill()
    writers["killed"].communicate()
    [part] = (tmp_path / "killed").iterdir()
    assert OWNED_PART.fullmatch(part.name)
    folder = tmp_path / f"{part.name}-folder"
    (folder / "below").mkdir(parents=True)
    remote = tmp_path / part.name.replace(part.name.split("-")[1], "00000000")  # a process of another host
    remote.touch()
    remove_stale_parts(tmp_path)
    assert list((tmp_path / "killed").iterdir()) == []
    assert len(list((tmp_path / "living").iterdir())) == 1
    assert not folder.exists()
    assert remote.exists()
    writers["living"].kill()
    writers["living"].communicate()


def test_containers_with_one_host_name_leave_each_others_temporary_files(tmp_path: Path) -> None:
    # Another namespace of process ids, as a container has: the writer's id means nothing there.
    code = (
        "import sys; from pathlib import Path; from tasks.stage.files import *; remove_stale_parts(Path(sys.argv[1]))"
    )
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    with staged_file(tmp_path / "model") as part:
        done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT)
        if "unshare" in done.stderr:
            pytest.skip(f"no namespaces here: {done.stderr.strip()[:80]}")
        assert done.returncode == 0, done.stderr
        assert part.exists()
