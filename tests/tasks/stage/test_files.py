"""Files that exist whole or not at all."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.errors import StorageFull
from tasks.stage.files import staged_file, write_atomic


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
