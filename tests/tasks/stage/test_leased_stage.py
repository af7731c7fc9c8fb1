"""A stage is computed by one process at a time; a process that lost its lease writes no more."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.errors import LeaseLost, LikenessError
from tasks.manifests.base import Manifest
from tasks.services.store import lease
from tasks.services.store.lease import list_leases, make_lease
from tasks.services.store.local import LocalStore
from tasks.stage.cache import Stage, StageFolder, find_manifest
from tasks.stage.context import Runtime
from tasks.stage.digests import dump_signed

STAGE = Stage("prior", Manifest, 1, settings=[], inputs=())
NAME = f"stages/prior-{STAGE.key}"


class Notes:
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, name: str, done: int, total: int, *, detail: str = "") -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        self.texts.append(text)

    def close(self) -> None:
        """Do nothing."""


def make_runtime(folder: Path) -> tuple[Runtime, Notes]:
    nothing: Any = SimpleNamespace()
    notes = Notes()
    store = LocalStore(folder / "store")
    runtime = Runtime("run", store, llm=nothing, tracker=nothing, progress=notes, live=nothing, work_folder=folder)
    return runtime, notes


def fill(folder: StageFolder, content: bytes = b"x") -> Manifest:
    folder.put("object", content)
    return folder.finish(Manifest(**folder.head(1, counts={"objects": 1})))


def test_a_second_run_of_the_same_stage_waits_and_takes_the_cached_result(tmp_path: Path) -> None:
    has_begun, may_end = threading.Event(), threading.Event()
    first, second = make_runtime(tmp_path), make_runtime(tmp_path)
    calls: list[str] = []

    def compute(folder: StageFolder) -> Manifest:
        calls.append("first")
        has_begun.set()
        assert may_end.wait(60)
        return fill(folder)

    thread = threading.Thread(target=first[0].run_stage, args=(STAGE, compute))
    thread.start()
    assert has_begun.wait(60)
    other = threading.Thread(target=second[0].run_stage, args=(STAGE, fill))
    other.start()
    while not second[1].texts:
        time.sleep(0.01)
    may_end.set()
    thread.join(60)
    other.join(60)
    assert calls == ["first"]
    assert not first[0].records["prior"].is_cached
    assert second[0].records["prior"].is_cached
    assert second[1].texts[0].startswith("prior waits for process ")
    assert list_leases(first[0].store, NAME) == []


def test_a_waiting_run_computes_the_stage_if_the_other_fails(tmp_path: Path) -> None:
    first, second = make_runtime(tmp_path)[0], make_runtime(tmp_path)[0]

    def fail(folder: StageFolder) -> Manifest:
        folder.put("object", b"half")
        raise LikenessError("no GPU")

    with pytest.raises(LikenessError, match="no GPU"):
        first.run_stage(STAGE, fail)
    assert second.run_stage(STAGE, fill).counts == {"objects": 1}
    assert not second.records["prior"].is_cached


def test_a_run_that_is_stopped_does_not_wait_on(tmp_path: Path) -> None:
    runtime, notes = make_runtime(tmp_path)
    runtime.store.put_bytes(f"leases/{NAME}/000001.json", dump_signed(make_lease("other")))
    runtime.stopping.set()
    with pytest.raises(LikenessError, match="the run is stopping"):
        runtime.run_stage(STAGE, fill)
    assert notes.texts == []


ZOMBIE = """
import sys
from pathlib import Path

from tasks.errors import LeaseLost
from tasks.manifests.base import Manifest
from tasks.services.store import lease
from tasks.services.store.local import LocalStore
from tasks.stage.cache import Stage, StageFolder

lease.HEARTBEAT_SECONDS, lease.EXPIRY_SECONDS, lease.TRUSTED_SECONDS = 0.1, 1.0, 0.5
stage = Stage("prior", Manifest, 1, settings=[], inputs=())
store = LocalStore(Path(sys.argv[1]) / "store")
with lease.hold_lease(
    store, f"stages/prior-{stage.key}", max_wait_seconds=0.0, poll_seconds=0.1, on_wait=lambda who: None
) as held:
    folder = StageFolder(store, "prior", stage.key, lease=held)
    print("computing", flush=True)
    sys.stdin.readline()
    try:
        folder.put("object", b"zombie")
    except LeaseLost:
        print("refused", flush=True)
"""


def test_a_suspended_process_writes_nothing_after_its_lease_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "zombie.py"
    script.write_text(ZOMBIE)
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as zombie:
        assert zombie.stdin is not None
        assert zombie.stdout is not None
        assert zombie.stdout.readline() == "computing\n"
        zombie.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(lease, "EXPIRY_SECONDS", 60.0)
        runtime, _ = make_runtime(tmp_path)
        manifest = runtime.run_stage(STAGE, fill)
        zombie.send_signal(signal.SIGCONT)
        zombie.stdin.write("go on\n")
        zombie.stdin.flush()
        assert zombie.stdout.readline() == "refused\n"
        assert zombie.wait(60) == 0
    assert runtime.store.find_bytes(manifest.objects[0].key) == b"x"


class LateLease:
    """A lease that another process takes over, and finishes under, right after the last check before the manifest."""

    def __init__(self, folder: StageFolder) -> None:
        self.other = folder
        self.num_final = 0

    def check(self, *, is_final: bool = False) -> None:
        self.num_final += is_final
        if self.num_final > 1:
            raise LeaseLost("another process took over")
        if self.num_final == 1:
            self.other.finish(Manifest(**self.other.head(1, counts={"of": 2})))


def test_a_process_that_was_suspended_after_its_last_check_replaces_no_manifest(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    folder = StageFolder(store, "prior", "k")
    folder.lease = LateLease(StageFolder(store, "prior", "k"))  # type: ignore[assignment]
    with pytest.raises(LeaseLost):
        folder.finish(Manifest(**folder.head(1, counts={"of": 1})))
    found = find_manifest(store, Manifest, stage="prior", key="k")
    assert found is not None
    assert found.counts == {"of": 2}


def test_a_manifest_is_written_again_where_nobody_took_the_lease(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    for count in (1, 2):
        folder = StageFolder(store, "prior", "k")
        folder.finish(Manifest(**folder.head(1, counts={"of": count})))
    found = find_manifest(store, Manifest, stage="prior", key="k")
    assert found is not None
    assert found.counts == {"of": 2}
