"""Open the configured tracker, the loggers beside it, and the live tracking of a run."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tasks.errors import LikenessError, ServiceUnavailable
from tasks.redaction import redact_url
from tasks.services.config import TrackingConfig
from tasks.services.tracking.base import NoTracker, Tracker
from tasks.services.tracking.journal import JOURNAL_NAME, Journal
from tasks.services.tracking.live import LiveRun
from tasks.services.tracking.mlflow_tracker import MlflowTracker

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0


def open_tracker(config: TrackingConfig, *, folder: Path) -> Tracker:
    """Return the configured tracker, and others beside it. Raises ConfigError where a package is missing."""
    first: Tracker = MlflowTracker(config, folder=folder) if config.kind == "mlflow" else NoTracker()
    if not config.loggers:
        return first
    from tasks.services.tracking.loggers import TensorboardLogger, Trackers, WandbLogger

    loggers: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorboardLogger, "wandb": WandbLogger}
    return Trackers(first, [loggers[name](config, folder=folder.absolute()) for name in config.loggers])


@dataclass(frozen=True)
class RunDescription:
    """What is logged of a run before it computes anything."""

    folder: Path
    """Of the run, inside the output folder; its name is the run's."""
    params: dict[str, str]
    tags: dict[str, str]


def open_live(config: TrackingConfig, tracker: Tracker, run: RunDescription) -> LiveRun:
    """Return a run's live tracking, with its journal in the run's folder where there is a server to be down."""
    output = run.folder.parent
    if config.kind == "none":
        return LiveRun(
            tracker, run.folder.name, run.params, run.tags, reopen=lambda: open_tracker(config, folder=output)
        )
    return LiveRun(
        tracker,
        run.folder.name,
        run.params,
        run.tags,
        journal=Journal(run.folder / JOURNAL_NAME),
        server=redact_url(config.uri),
        experiment=config.experiment,
        system_metrics_interval=config.system_metrics_interval,
        reopen=lambda: open_tracker(config, folder=output),
        send_left_over=partial(send_left_over, config, output),
    )


def send_left_over(config: TrackingConfig, output: Path) -> None:
    """Send what earlier runs of an output folder, killed or failed while the server was down, have left in journals."""
    for path in sorted(output.glob(f"*/{JOURNAL_NAME}")):
        journal = Journal(path)
        try:
            if not journal.open():  # its run is at work
                continue
            if journal.server == redact_url(config.uri):
                # Its run's own experiment, not that of the run that happens to send it.
                own = config.model_copy(update={"experiment": journal.experiment or config.experiment})
                send_journal(journal, MlflowTracker(own, folder=output))
        except (LikenessError, OSError) as error:
            log.warning("%s is sent by a later run: %s", path, error)
        finally:
            journal.close()


def send_journal(journal: Journal, tracker: MlflowTracker) -> None:
    """Send the rest of a journal, close its run and remove the file. Raises ServiceUnavailable."""
    live = LiveRun(tracker, journal.name, {}, journal=journal, is_replayed=True)
    if journal.run_id is not None:
        tracker.run_id = live.run_id = journal.run_id
        live.is_open = True
    live.send_pending()
    if tracker.run_id is not None:  # also of a start that was refused half-way
        tracker.close_killed(tracker.run_id)
    journal.remove()


def warn_unreachable(tracker: Tracker, note: Callable[[str], None]) -> None:
    """Note that a tracking server doesn't answer: metrics wait for it in the journal. Raises ConfigError."""
    try:
        tracker.check()
    except ServiceUnavailable as error:
        note(f"warning: {error}; the run continues, and its metrics are sent when the server answers")


def wait_reachable(config: TrackingConfig, tracker: Tracker, *, on_wait: Callable[[str], None]) -> None:
    """Wait until a tracking server answers. Raises ServiceUnavailable where it doesn't in time."""
    deadline = time.monotonic() + config.max_wait_seconds
    while True:
        try:
            return tracker.check()
        except ServiceUnavailable:
            if time.monotonic() >= deadline:
                raise
        on_wait("the tracking server")
        time.sleep(POLL_SECONDS)
