"""Tell the tracking server about a run: parameters, losses, figures, pictures, the model."""

from pathlib import Path

from tasks.services.tracking.base import Tracker
from tasks.services.tracking.live import LiveRun

PUBLICATION_TAG = "likeness.publication"
SAMPLES = "training_samples"


def track_run(
    tracker: Tracker,
    *,
    name: str,
    params: dict[str, str],
    publication_key: str,
    tags: dict[str, str],
    losses: list[dict[str, float]],
    figures: dict[str, float],
    folder: Path,
    registered_model: str,
    is_registered: bool,
    live: LiveRun | None = None,
) -> tuple[str | None, str | None]:
    """Log everything and register the model; return tracking run id and model version.

    `folder` holds `model/`, `report/` and, where training drew any, `training_samples/`. A run that was opened
    while training, `live`, is completed and closed.
    """
    if live is not None:
        tracker = live.take_over()
    tracker.forget(tag=PUBLICATION_TAG, value=publication_key)
    tags = {**tags, PUBLICATION_TAG: publication_key}
    is_failed = True
    logged: set[tuple[str, int]] = set()
    try:
        if live is not None and live.is_open:
            run_id, logged, live.is_open = live.run_id, live.logged, False
            for tag, value in tags.items():
                tracker.set_tag(tag, value)
        else:
            run_id = tracker.start(name=name, params=params, tags={**(live.tags if live else {}), **tags})
        rows = [
            (f"train/{key}", float(value), int(row["step"]))
            for row in losses
            for key, value in row.items()
            if key != "step" and (f"train/{key}", int(row["step"])) not in logged
        ]
        tracker.log_metrics(rows)
        last = int(losses[-1]["step"]) if losses else 0
        tracker.log_metrics([(key, value, last) for key, value in figures.items()])
        tracker.log_folder(folder / "report", path="report")
        if (folder / SAMPLES).is_dir():
            tracker.log_folder(folder / SAMPLES, path=SAMPLES)
        version = None
        if is_registered:
            tracker.log_folder(folder / "model", path="model")
            version = tracker.register(name=registered_model, path="model", description=f"Tuned by {name}", tags=tags)
        is_failed = False
    finally:
        tracker.finish(is_failed=is_failed)
    return run_id, version
