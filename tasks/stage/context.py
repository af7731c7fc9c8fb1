"""The runtime of one run: services, progress and stage records."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tasks.errors import LikenessError
from tasks.manifests.base import Manifest
from tasks.services.llm.service import LlmService
from tasks.services.store.base import Store
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
        with self.recorded(stage.name, stage.key) as record:
            manifest = find_manifest(self.store, stage.manifest, stage=stage.name, key=stage.key)
            missing = find_missing_effect(manifest) if manifest else ""
            if missing:
                self.progress.note(f"warning: {stage.name} {stage.key[:8]} is computed again: {missing}")
                manifest = None
            record.is_cached = manifest is not None
            if manifest is None:
                manifest = compute(StageFolder(self.store, stage.name, stage.key))
                record.cost_usd = manifest.cost_usd  # of this run only: a cached stage costs nothing
            record.counts = manifest.counts
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in manifest.counts.items())
        word = "cached" if record.is_cached else "done"
        self.progress.note(f"{stage.name:<11} {word:<6} {record.seconds:6.1f} s  {stage.key[:8]}  {counts}")
        return manifest

    @contextmanager
    def recorded(self, stage: str, key: str) -> Iterator[StageRecord]:
        """Record a stage's start and duration, and announce its key."""
        record = StageRecord(key, started=time.monotonic())
        # Announced at the start, so that the record of a killed run names its last stage. Stages may run concurrently.
        with self.lock:
            self.records[stage] = record
            self.on_stage({name: other.key for name, other in self.records.items()})
        try:
            yield record
        finally:
            record.ended = time.monotonic()  # also where the stage fails
            record.seconds = round(record.ended - record.started, 3)

    def measure_overhead(self, started: float) -> float:
        """Return the seconds since `started`, on the monotonic clock, in which no stage was running."""
        # Sweep over stages by start time; `covered` is the end of the union of intervals so far.
        now, covered = time.monotonic(), started
        overhead = 0.0
        for record in sorted(self.records.values(), key=lambda record: record.started):
            # A gap before this stage; none if it overlaps the ones before.
            overhead += max(0.0, record.started - covered)
            covered = max(covered, record.ended)
        return overhead + max(0.0, now - covered)
