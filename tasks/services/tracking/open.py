"""Open the configured tracker and the loggers beside it."""

from collections.abc import Callable
from pathlib import Path

from tasks.services.config import TrackingConfig
from tasks.services.tracking.base import NoTracker, Tracker
from tasks.services.tracking.mlflow_tracker import MlflowTracker


def open_tracker(config: TrackingConfig, *, folder: Path) -> Tracker:
    """Return the configured tracker, and others beside it. Raises ConfigError where a package is missing."""
    first: Tracker = MlflowTracker(config, folder=folder) if config.kind == "mlflow" else NoTracker()
    if not config.loggers:
        return first
    from tasks.services.tracking.loggers import TensorboardLogger, Trackers, WandbLogger

    loggers: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorboardLogger, "wandb": WandbLogger}
    return Trackers(first, [loggers[name](config, folder=folder.absolute()) for name in config.loggers])
