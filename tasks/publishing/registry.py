"""Log a run to the tracking server: parameters, losses, metrics, report, samples, model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.manifests.training import LossRow
from tasks.services.tracking.base import Tracker
from tasks.services.tracking.live import LiveRun

PUBLICATION_TAG = "likeness.publication"
SAMPLES = "training_samples"


@dataclass(frozen=True)
class TrackedRun:
    """The content of a tracking run."""

    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    publication_key: str
    """An earlier tracking run of the same publication is replaced."""
    losses: Sequence[LossRow]
    figures: Mapping[str, float]
    folder: Path
    """Holds `model/`, `report/` and, where training sampled images, `training_samples/`."""
    registered_model: str | None
    """None: the model is not registered."""

    @property
    def last_step(self) -> int:
        """The step that figures are logged at."""
        return self.losses[-1].step if self.losses else 0

    def loss_rows(self) -> list[tuple[str, float, int]]:
        """Return (name, value, step) of every finite value of the loss log."""
        return [
            (f"train/{name}", float(value), row.step)
            for row in self.losses
            for name, value in row.model_dump(exclude_none=True, exclude={"step"}).items()
        ]


def track_run(tracker: Tracker, run: TrackedRun, *, live: LiveRun | None = None) -> tuple[str | None, str | None]:
    """Log a run and register its model; return the tracking run id and model version.

    `live`, a tracking run opened during training, is completed and closed.
    """
    if live is not None:
        tracker = live.take_over()
    # A repeated publication replaces its earlier tracking run instead of adding a duplicate.
    tracker.forget(tag=PUBLICATION_TAG, value=run.publication_key)
    tags = {**run.tags, PUBLICATION_TAG: run.publication_key}
    is_failed = True  # until the end is reached, so that an exception marks the tracking run as failed
    logged: set[tuple[str, int]] = set()
    try:
        if live is not None and live.is_open:
            # No longer open to `abandon`: from here on, `finish` below closes the run.
            run_id, logged, live.is_open = live.run_id, live.logged, False
            for tag, value in tags.items():
                tracker.set_tag(tag, value)
        else:
            run_id = tracker.start(name=run.name, params=dict(run.params), tags={**(live.tags if live else {}), **tags})
        # A live run has logged some of the losses already.
        tracker.log_metrics(row for row in run.loss_rows() if (row[0], row[2]) not in logged)
        tracker.log_metrics((name, value, run.last_step) for name, value in run.figures.items())
        tracker.log_folder(run.folder / "report", path="report")
        if (run.folder / SAMPLES).is_dir():
            tracker.log_folder(run.folder / SAMPLES, path=SAMPLES)
        version = None
        if run.registered_model:
            # Before the version is registered, which must not refer to missing artifacts.
            tracker.log_folder(run.folder / "model", path="model")
            version = tracker.register(
                name=run.registered_model, path="model", description=f"Tuned by {run.name}", tags=tags
            )
        is_failed = False
    finally:
        tracker.finish(is_failed=is_failed)
    return run_id, version
