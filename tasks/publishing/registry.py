"""Log a run to the tracking server: parameters, losses, metrics, report, samples, model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.manifests.training import LossRow
from tasks.services.config import TrackingConfig
from tasks.services.llm.budget.ledger import read_rows
from tasks.services.tracking.base import LlmCall, Tracker
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
    llm_calls: Sequence[LlmCall] = ()

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

    def list_samples(self) -> list[tuple[int, Path]]:
        """Return the images that training sampled, by step."""
        return [(int(file.stem.removeprefix("step-")), file) for file in sorted((self.folder / SAMPLES).glob("*.png"))]


def list_llm_calls(config: TrackingConfig, ledger: Path) -> list[LlmCall]:
    """Return the calls in a run's ledger where they are traced, without its texts, which may quote replies."""
    if not config.llm_traces or not ledger.is_file():
        return []
    return [
        LlmCall(
            role=row.role,
            ended_at=row.at,
            seconds=row.seconds,
            is_ok=row.outcome in ("ok", "cached"),
            input_tokens=row.usage.input_tokens,
            output_tokens=row.usage.output_tokens,
            attributes={
                "profile": row.profile,
                "requested_model": row.requested_model,
                "served_model": row.served_model,
                "response_format": row.response_format,
                "outcome": row.outcome,
                "is_cached": row.outcome == "cached",
                "is_batch": row.is_batch,
                "cost_usd": row.cost_usd,
                "price_date": row.price_date,
                "fallback_index": row.fallback_index,
                "seconds": row.seconds,
            },
        )
        for row in read_rows(ledger)
        if row is not None
    ]


def track_run(tracker: Tracker, run: TrackedRun, *, live: LiveRun | None = None) -> tuple[str | None, str | None]:
    """Log a run and register its model; return the tracking run id and model version.

    `live`, a tracking run opened during training, is completed and closed.

    Raises:
        ServiceUnavailable: the server doesn't take it; what it has of the run is marked as failed.

    """
    if live is not None:
        tracker = live.take_over()
    # A repeated publication replaces its earlier tracking run instead of adding a duplicate.
    forgotten = tracker.forget(tag=PUBLICATION_TAG, value=run.publication_key)
    if live is not None and live.run_id in forgotten:  # an earlier attempt of this process has failed half-way
        live.is_open = False
    tags = {**run.tags, PUBLICATION_TAG: run.publication_key}
    is_failed = True  # until the end is reached, so that an exception marks the tracking run as failed
    logged: set[tuple[str, int]] = set()
    is_live = live is not None and live.is_open
    try:
        if live is not None and live.is_open:
            run_id, logged = live.run_id, live.logged
            for tag, value in tags.items():
                tracker.set_tag(tag, value)
        else:
            run_id = tracker.start(name=run.name, params=dict(run.params), tags={**(live.tags if live else {}), **tags})
        # A live run has logged some of the losses already.
        tracker.log_metrics(row for row in run.loss_rows() if (row[0], row[2]) not in logged)
        tracker.log_metrics((name, value, run.last_step) for name, value in run.figures.items())
        tracker.log_folder(run.folder / "report", path="report")
        for step, file in run.list_samples():
            tracker.log_image(file, key=SAMPLES, step=step)
        if run.llm_calls:
            tracker.log_llm_calls(run.llm_calls)
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
        if live is not None and is_live:
            live.is_open = False  # not before: where this call fails, `abandon` or the next run closes it
    if live is not None:
        live.complete()
    return run_id, version
