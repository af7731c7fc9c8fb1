"""Kinds of faults, and their seeded schedule."""

import contextlib
import resource
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil

from tasks.errors import LikenessError
from tasks.services.store.lease import Lease, find_start, read_lease
from tasks.stage.cache import PREFIXES
from tasks.stage.digests import dump_signed
from tests.chaos.processes import Found, find_processes, list_processes
from tests.chaos.site import MLFLOW, PREFECT, WORKER, Site
from tests.support.fault_proxy import FaultProxy, Mode

CLOCK_SECONDS = 600
"""Five times what a lease lives, and below the 15 minutes within which S3 accepts a request's time."""
FILE_BYTES = 4096
"""The largest file during a full disk: logs and small records still fit, weights do not."""


@dataclass(frozen=True)
class Planned:
    """One fault of the schedule."""

    delay: float
    kind: str
    seconds: float
    """How long it lasts; kills last until their process is started again."""


@dataclass(frozen=True)
class Injected:
    """One fault that happened."""

    kind: str
    at: float
    """Unix time in seconds."""
    ended: float
    flow_run_ids: tuple[str, ...]
    """The runs that it hit."""


@dataclass
class Strike:
    """A fault in progress."""

    site: Site
    random: Random
    seconds: float
    active: tuple[str, ...]
    """Flow runs in progress."""
    hit: list[str] = field(default_factory=list)

    def wait(self) -> None:
        time.sleep(self.seconds)

    def find_target(self, kind: str) -> Found | None:
        """Return a process of a kind that works for a run, after waiting for one; None where none comes."""
        deadline = time.monotonic() + self.site.patience
        while time.monotonic() < deadline:
            found = [each for each in find_processes(self.site.token, kind) if each.flow_run_id in self.active]
            if found:
                return self.random.choice(found)
            time.sleep(0.2)
        return None

    def hit_all(self) -> None:
        """Note that the fault hits every run in progress."""
        self.hit.extend(self.active)


def plan_faults(seed: int, count: int, kinds: tuple[str, ...]) -> list[Planned]:
    """Return a schedule: every kind equally often, in an order and with durations that follow from the seed."""
    random = Random(seed)
    planned: list[Planned] = []
    while len(planned) < count:
        for kind in random.sample(kinds, len(kinds)):
            planned.append(Planned(random.uniform(1, 8), kind, random.uniform(2, 12)))
    return planned[:count]


def inject(site: Site, planned: Planned, active: tuple[str, ...]) -> Injected | None:
    """Inject a fault and heal it; return None where nothing was there to be hit."""
    # Targets are drawn by the fault's own figures, so that one that found no target shifts no later one.
    strike = Strike(site, Random(planned.seconds), planned.seconds, active)
    at = time.time()
    is_done = KINDS[planned.kind](strike)
    return Injected(planned.kind, at, time.time(), tuple(dict.fromkeys(strike.hit))) if is_done else None


def kill_one(kind: str) -> Callable[[Strike], bool]:
    """Return a fault that kills a process of one run."""

    def strike_one(strike: Strike) -> bool:
        target = strike.find_target(kind)
        if target is None:
            return False
        strike.hit.append(target.flow_run_id)
        target.kill()
        return True

    return strike_one


def kill_worker(strike: Strike) -> bool:
    """Kill a worker of the pool; an operator starts it again."""
    target = strike.random.choice(find_processes(strike.site.token, "worker"))
    children = {child.pid for child in target.process.children(recursive=True)}
    strike.hit += [each.flow_run_id for each in list_processes(strike.site.token) if each.process.pid in children]
    strike.hit[:] = [each for each in strike.hit if each]
    target.kill()
    strike.wait()
    strike.site.up()
    strike.site.start_workers()
    return True


def lose_machine(strike: Strike) -> bool:
    """Kill a worker with its runs in mid-training, and remove that training's folder; an operator starts a worker.

    As where a machine is gone with its disk: another worker continues from the checkpoints in the store.
    """
    trainer = strike.find_target("trainer")
    if trainer is None:
        return False
    folder = Path(trainer.command.rsplit(" ", 1)[-1]).parent
    if not wait_for_upload(strike, trainer, folder):
        return False
    for worker in find_processes(strike.site.token, "worker"):
        children = worker.process.children(recursive=True)
        pids = {child.pid for child in children}
        if trainer.process.pid in pids:
            hit = [each.flow_run_id for each in list_processes(strike.site.token) if each.process.pid in pids]
            strike.hit += filter(None, hit)
            kill_all([worker.process, *children])
    if not strike.hit:
        return False
    shutil.rmtree(folder, ignore_errors=True)  # a training that ended meanwhile removes it itself
    strike.wait()
    strike.site.up()
    strike.site.start_workers()
    return True


def wait_for_upload(strike: Strike, trainer: Found, folder: Path) -> bool:
    """Wait until the store of a training holds a checkpoint of it; return False where it ends before."""
    [place] = [place for place in strike.site.places.values() if folder.is_relative_to(place.folder)]
    store = strike.site.open_store(place)
    while trainer.process.is_running() and trainer.process.status() != psutil.STATUS_ZOMBIE:
        with contextlib.suppress(LikenessError):
            found = store.list_keys(f"{PREFIXES['training']}/{folder.name}/resume/")
            if any(key.endswith("/manifest.json") for key in found):
                return True
        time.sleep(0.1)
    return False


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """Kill processes and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def suspend(strike: Strike) -> bool:
    """Stop all processes of one run, and let them continue."""
    target = strike.find_target("flow")
    if target is None:
        return False
    strike.hit.append(target.flow_run_id)
    family = [each for each in list_processes(strike.site.token) if each.flow_run_id == target.flow_run_id]
    for each in family:
        each.signal(signal.SIGSTOP)
    strike.wait()
    for each in family:
        each.signal(signal.SIGCONT)
    return True


def restart(name: str) -> Callable[[Strike], bool]:
    """Return a fault that kills a server of the stack and starts it again."""

    def strike_server(strike: Strike) -> bool:
        server = strike.site.find_server(name)
        if server is None:
            return False
        strike.hit_all()
        for each in list_processes(strike.site.token):  # MLflow's server has a child
            if each.process.pid == server.pid or each.process.ppid() == server.pid:
                each.kill()
        strike.wait()
        strike.site.up()
        return True

    return strike_server


def lock_database(strike: Strike) -> bool:
    """Hold the write lock of Prefect's SQLite database."""
    strike.hit_all()
    path = strike.site.output / "stack" / "prefect" / "prefect.db"
    with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        strike.wait()
        connection.execute("ROLLBACK")
    return True


def break_proxy(mode: Mode) -> Callable[[Strike], bool]:
    """Return a fault of the bucket's proxy."""

    def strike_bucket(strike: Strike) -> bool:
        bucket = strike.site.bucket
        assert bucket is not None
        before = sum(bucket.faults.values())
        strike.hit += select_runs(strike, "s3")
        if not strike.hit:
            return False
        deadline = time.monotonic() + strike.site.patience
        with set_mode(bucket, mode):
            while sum(bucket.faults.values()) == before and time.monotonic() < deadline:
                time.sleep(0.1)
            strike.wait()  # from the first request that it hit
        return sum(bucket.faults.values()) > before  # else no run talked to the bucket meanwhile

    return strike_bucket


@contextlib.contextmanager
def set_mode(proxy: FaultProxy, mode: Mode) -> Iterator[None]:
    proxy.mode = mode
    try:
        yield
    finally:
        proxy.mode = "pass"


def select_runs(strike: Strike, kind: str) -> list[str]:
    """Return the runs in progress whose place is of a kind."""
    names = {name for name, place in strike.site.places.items() if place.kind == kind}
    found = []
    with strike.site.api() as client:
        for flow_run_id in strike.active:
            run = client.get(f"/flow_runs/{flow_run_id}").json()
            if str(run["parameters"]["request"]["settings"]["output_dir"]).rsplit("/", 1)[-1] in names:
                found.append(flow_run_id)
    return found


def kill_vision(strike: Strike) -> bool:
    """Kill a vision server: a run's own, or the common one, which is started again."""
    own = [each for each in find_processes(strike.site.token, "vision server") if each.flow_run_id in strike.active]
    if own:
        target = strike.random.choice(own)
        strike.hit.append(target.flow_run_id)
        target.kill()
        return True
    strike.hit += select_runs(strike, "s3")
    if not strike.hit:
        return False
    strike.site.end_vision()
    strike.wait()
    strike.site.start_vision()
    return True


def fill_disk(strike: Strike) -> bool:
    """Refuse to one run's processes files above a size (RLIMIT_FSIZE), as a full quota does."""
    target = strike.find_target("flow")
    if target is None:
        return False
    strike.hit.append(target.flow_run_id)
    deadline = time.monotonic() + strike.seconds
    while time.monotonic() < deadline:  # again: processes come and go
        limit_files(strike, target.flow_run_id, FILE_BYTES)
        time.sleep(0.2)
    limit_files(strike, target.flow_run_id, resource.RLIM_INFINITY)
    return True


def limit_files(strike: Strike, flow_run_id: str, limit: int) -> None:
    """Set the soft limit of file sizes of a run's processes; logs of the worker are not its own."""
    for each in list_processes(strike.site.token):
        if each.flow_run_id == flow_run_id:
            with contextlib.suppress(OSError):
                resource.prlimit(each.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def step_clock(strike: Strike) -> bool:
    """Set the clock of the second worker's machine by ten minutes during a run, or right again where it is wrong."""
    clock = strike.site.clock
    deadline = time.monotonic() + strike.site.patience
    while clock.environment() and time.monotonic() < deadline:
        workers = {worker.pid for worker in strike.site.workers if worker.is_alive()}
        flows = find_processes(strike.site.token, "flow")
        strike.hit += [each.flow_run_id for each in flows if workers & {each.process.pid, *list_parents(each.process)}]
        strike.hit[:] = [each for each in strike.hit if each in strike.active]
        if strike.hit:
            clock.set(0 if clock.read() else strike.random.choice((-CLOCK_SECONDS, CLOCK_SECONDS)))
            strike.wait()
            return True
        time.sleep(0.2)
    return False


def list_parents(process: psutil.Process) -> list[int]:
    """Return the ids of all processes above one that may have ended."""
    try:
        return [parent.pid for parent in process.parents()]
    except psutil.Error:
        return []


def lose_lease(strike: Strike) -> bool:
    """Delete a stage's lease, or overwrite it with that of a process that is gone."""
    deadline = time.monotonic() + strike.site.patience
    while time.monotonic() < deadline:
        for place in strike.site.places.values():
            with contextlib.suppress(LikenessError):
                store = strike.site.open_store(place)
                for key in store.list_keys("leases/stages/"):
                    lease = read_lease(store, key)
                    owner = find_owner(strike, lease)
                    if not owner:
                        continue
                    strike.hit.append(owner)
                    if strike.random.random() < 0.5:
                        store.delete(key)
                    else:
                        gone = Lease(
                            owner="another",
                            host=socket.gethostname(),
                            pid=2**22 - 1,
                            process_started=1.0,
                            expires_at=time.time() + 120,
                        )
                        assert find_start(gone.pid) == 0
                        store.put_bytes(key, dump_signed(gone))
                    return True
        time.sleep(0.2)
    return False


def find_owner(strike: Strike, lease: Lease | None) -> str:
    """Return the flow run in progress that holds a lease; empty where none does."""
    for each in find_processes(strike.site.token, "flow") if lease else ():
        if lease is not None and each.process.pid == lease.pid and each.flow_run_id in strike.active:
            return each.flow_run_id
    return ""


KINDS: dict[str, Callable[[Strike], bool]] = {
    "worker killed": kill_worker,
    "flow process killed": kill_one("flow"),
    "trainer killed": kill_one("trainer"),
    "machine lost": lose_machine,
    "run suspended (SIGSTOP, SIGCONT)": suspend,
    "Prefect server restarted": restart(PREFECT),
    "SQLite lock held": lock_database,
    "S3 answers 503": break_proxy("503"),
    "S3 connections cut": break_proxy("cut"),
    "vision server killed": kill_vision,
    "MLflow restarted": restart(MLFLOW),
    "disk full (RLIMIT_FSIZE)": fill_disk,
    "stage lease lost": lose_lease,
    "clock set by 10 min": step_clock,
}
NAMES = "worker flow trainer machine suspend prefect sqlite s3-503 s3-cut vision mlflow disk lease clock"
SLUGS = dict(zip(NAMES.split(), KINDS, strict=True))
"""Names of the kinds on the command line."""
__all__ = ["KINDS", "SLUGS", "WORKER", "Injected", "Planned", "inject", "plan_faults"]
