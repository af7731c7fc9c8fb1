"""The runtime of one run: services, progress and stage records."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tasks.errors import LeaseLost, LikenessError
from tasks.manifests.base import Manifest
from tasks.services.llm.service import LlmService
from tasks.services.store.base import Store
from tasks.services.store.lease import hold_lease
from tasks.services.tracking.base import Tracker
from tasks.services.tracking.live import LiveRun
from tasks.stage.cache import Stage, StageFolder, find_manifest
from tasks.stage.progress import ProgressView

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Manifest)


@dataclass
class StageRecord:
    """Outcome and timing of a stage in this invocation."""

    key: str
    is_cached: bool = False
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    cost_usd: float | None = 0.0
    started: float = 0.0
    ended: float = 0.0
    """On the monotonic clock."""


@dataclass
class Runtime:
    """Services and records of one run; passed to steps, never stored."""

    run_id: str
    store: Store
    llm: LlmService
    tracker: Tracker
    progress: ProgressView
    live: LiveRun
    """The tracking run, live while stages run."""
    work_folder: Path
    """Local scratch space that outlives the run: training state, fetched photos."""
    records: dict[str, StageRecord] = field(default_factory=dict)
    spans: list[StageRecord] = field(default_factory=list)
    """All executions of stages."""
    on_stage: Callable[[dict[str, str]], None] = lambda keys: None
    """Called with the keys of all stages so far whenever one begins."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)
    num_training_steps: int = 0
    first_training_step: int = 0

    def progress_callback(self, name: str) -> Callable[[int, int], None]:
        """Return a callback that updates one progress bar and raises LikenessError once the run is stopping."""

        def update(done: int, total: int) -> None:
            # A stage in another thread can't be interrupted, but it calls this at every item.
            if self.stopping.is_set():
                raise LikenessError("the run is stopping")
            self.progress.update(name, done, total)

        return update

    def wait_note(self, name: str) -> Callable[[str], None]:
        """Return a callback that notes once what a stage waits for; it raises LikenessError if the run is stopping."""
        shown: set[str] = set()

        def on_wait(what: str) -> None:
            if self.stopping.is_set():
                raise LikenessError("the run is stopping")
            if what not in shown:
                shown.add(what)
                self.progress.note(f"{name} waits for {what}")

        return on_wait

    def run_stage(
        self,
        stage: Stage[M],
        compute: Callable[[StageFolder], M],
        *,
        find_missing_effect: Callable[[M], str] = lambda manifest: "",
    ) -> M:
        """Return the cached manifest of a stage if it verifies; else compute it.

        Args:
            stage: the stage with its inputs.
            compute: fills the folder and writes the manifest.
            find_missing_effect: returns which side effect outside the store is missing, or an empty string.

        """

        def find() -> tuple[M | None, str]:
            manifest = find_manifest(self.store, stage.manifest, stage=stage.name, key=stage.key)
            missing = find_missing_effect(manifest) if manifest else ""
            return (None if missing else manifest), missing

        with self.recorded(stage.name, stage.key) as record:
            manifest, missing = find()
            if missing:
                self.progress.note(f"warning: {stage.name} {stage.key[:8]} is computed again: {missing}")
            record.is_cached = manifest is not None
            while manifest is None:
                manifest = self._compute_leased(stage, lambda: find()[0], compute)
            record.counts = manifest.counts
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in manifest.counts.items())
        word = "cached" if record.is_cached else "done"
        self.progress.note(f"{stage.name:<11} {word:<6} {record.seconds:6.1f} s  {stage.key[:8]}  {counts}")
        return manifest

    def _compute_leased(
        self, stage: Stage[M], find: Callable[[], M | None], compute: Callable[[StageFolder], M]
    ) -> M | None:
        """Compute a stage under its lease, or return what another run computed while this one waited for it.

        Returns None where the lease was lost, for example in a suspend of the machine: another run computes the stage.
        """
        on_wait = self.wait_note(stage.name)
        record, name = self.records[stage.name], f"stages/{stage.name}-{stage.key}"
        try:
            with hold_lease(self.store, name, max_wait_seconds=math.inf, poll_seconds=1.0, on_wait=on_wait) as lease:
                manifest = find()  # again: another run may have finished it before this one got the lease
                record.is_cached = manifest is not None
                if manifest is None:
                    manifest = compute(StageFolder(self.store, stage.name, stage.key, lease=lease))
                    record.cost_usd = manifest.cost_usd  # of this run only: a cached stage costs nothing
                return manifest
        except LeaseLost as error:
            self.progress.note(f"warning: {error}")
            return None

    @contextmanager
    def recorded(self, stage: str, key: str) -> Iterator[StageRecord]:
        """Record a stage's start and duration, and announce its key."""
        record = StageRecord(key, started=time.monotonic())
        # Announced at the start, so that the record of a killed run names its last stage. Stages may run concurrently.
        with self.lock:
            # A stage runs again where another checkpoint than the trained one is picked, or a person changed photos.
            earlier = self.records.get(stage)
            self.records[stage] = record
            self.spans.append(record)
            self.on_stage({name: other.key for name, other in self.records.items()})
        try:
            yield record
        finally:
            record.ended = time.monotonic()  # also where the stage fails
            record.seconds = round(record.ended - record.started + (earlier.seconds if earlier else 0.0), 3)

    def measure_overhead(self, started: float) -> float:
        """Return the seconds since `started`, on the monotonic clock, in which no stage was running."""
        # Sweep over stages by start time; `covered` is the end of the union of intervals so far.
        now, covered = time.monotonic(), started
        overhead = 0.0
        for record in sorted(self.spans, key=lambda record: record.started):
            # A gap before this stage; none if it overlaps the ones before.
            overhead += max(0.0, record.started - covered)
            covered = max(covered, record.ended)
        return overhead + max(0.0, now - covered)
