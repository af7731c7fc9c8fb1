"""TensorBoard and Weights & Biases beside MLflow: curves and pictures, no registry.

Their packages are optional: `pip install tensorboard`, `pip install wandb`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.config import TrackingConfig
from tasks.services.tracking.base import DatasetInfo, LlmCall, MetricRow, NoTracker, Tracker, Version


class TensorboardLogger(NoTracker):
    """Writes event files below `tensorboard/` in the output folder; `tensorboard --logdir` shows them."""

    def __init__(self, config: TrackingConfig, *, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("tracking with tensorboard needs the package: pip install tensorboard") from error
        self.open = SummaryWriter
        self.folder = folder / "tensorboard"
        self.writer: Any = None

    def start(
        self, *, name: str, params: dict[str, str], tags: dict[str, str], started_ms: int | None = None
    ) -> str | None:
        """Open the run's folder and write its parameters as a table."""
        self.writer = self.open(str(self.folder / name))
        rows = "\n".join(f"| {key} | {value[:200]} |" for key, value in params.items())
        self.writer.add_text("parameters", f"| name | value |\n|---|---|\n{rows}")
        return name

    def log_metrics(self, rows: Iterable[MetricRow], *, at_ms: int | None = None) -> None:
        """Add points to the curves."""
        for name, value, step in rows:
            self.writer.add_scalar(name, value, step, walltime=None if at_ms is None else at_ms / 1000)

    def log_folder(self, folder: Path, *, path: str) -> None:
        """Log the folder's PNG images; other files are skipped."""
        for file in sorted(folder.glob("*.png")):
            self.log_image(file, key=f"{path}/{file.stem}", step=0)

    def log_image(self, file: Path, *, key: str, step: int) -> None:
        """Add an image to a series."""
        import numpy as np
        from PIL import Image

        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self.writer.add_image(key, pixels, global_step=step, dataformats="HWC")

    def finish(self, *, is_failed: bool) -> None:
        """Flush and close."""
        if self.writer is not None:
            self.writer.close()


class WandbLogger(NoTracker):
    """A Weights & Biases run below `wandb/` in the output folder; offline by default."""

    def __init__(self, config: TrackingConfig, *, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("tracking with wandb needs the package: pip install wandb") from error
        self.wandb: Any = wandb
        self.config = config
        self.folder = folder
        self.run: Any = None

    def start(
        self, *, name: str, params: dict[str, str], tags: dict[str, str], started_ms: int | None = None
    ) -> str | None:
        """Open a run in the project named after the experiment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = self.wandb.init(
                project=self.config.experiment,
                name=name,
                config={**params, **tags},
                dir=str(self.folder),
                mode=self.config.wandb_mode,
                settings=self.wandb.Settings(silent=True),
            )
        except (self.wandb.errors.UsageError, self.wandb.errors.AuthenticationError) as error:
            raise ConfigError(f"W&B refuses: {error}; run `wandb login`, or set tracking.wandb_mode=offline") from error
        except self.wandb.errors.Error as error:
            raise ServiceUnavailable(f"W&B does not answer: {error}; tracking.wandb_mode=offline needs none") from error
        return str(self.run.id)

    def log_metrics(self, rows: Iterable[MetricRow], *, at_ms: int | None = None) -> None:
        """Log points with `step` as a metric of its own: W&B drops values of its built-in step that don't increase."""
        by_step: dict[int, dict[str, float]] = {}
        for name, value, step in rows:
            by_step.setdefault(step, {})[name] = value
        self.run.define_metric("*", step_metric="step")
        for step, values in sorted(by_step.items()):
            self.run.log({**values, "step": step})

    def log_folder(self, folder: Path, *, path: str) -> None:
        """Log the folder's PNG images; other files are skipped."""
        pictures = {f"{path}/{file.stem}": self.wandb.Image(str(file)) for file in sorted(folder.glob("*.png"))}
        if pictures:
            self.run.log(pictures)

    def log_image(self, file: Path, *, key: str, step: int) -> None:
        """Log an image with `step` as a metric of its own, as `log_metrics` does."""
        self.run.log({key: self.wandb.Image(str(file)), "step": step})

    def finish(self, *, is_failed: bool) -> None:
        """Close the run."""
        if self.run is not None:
            self.run.finish(exit_code=int(is_failed))


class Trackers:
    """Forwards to several trackers; queries, tags and the model registry use the first alone."""

    def __init__(self, first: Tracker, others: list[Tracker]) -> None:
        self.first = first
        self.all = [first, *others]

    def start(
        self, *, name: str, params: dict[str, str], tags: dict[str, str], started_ms: int | None = None
    ) -> str | None:
        """Open a run in each and return the first one's id."""
        # The first alone has a server that a call may be repeated for; files are opened after it has answered.
        run_ids = [tracker.start(name=name, params=params, tags=tags, started_ms=started_ms) for tracker in self.all]
        return run_ids[0]

    def check(self) -> None:
        """Check each tracker."""
        for tracker in self.all:
            tracker.check()

    def close_stale(self, *, tag: str, value: str, except_run: str) -> None:
        """Forward to the first tracker."""
        self.first.close_stale(tag=tag, value=value, except_run=except_run)

    def set_tag(self, name: str, value: str) -> None:
        """Forward to the first tracker."""
        self.first.set_tag(name, value)

    def log_datasets(self, datasets: Sequence[DatasetInfo]) -> None:
        """Forward to the first tracker."""
        self.first.log_datasets(datasets)

    def find_link(self, run_id: str, *, artifact: str = "") -> str:
        """Forward to the first tracker."""
        return self.first.find_link(run_id, artifact=artifact)

    def forget(self, *, tag: str, value: str) -> list[str]:
        """Forward to the first tracker."""
        return self.first.forget(tag=tag, value=value)

    def log_metrics(self, rows: Iterable[MetricRow], *, at_ms: int | None = None) -> None:
        """Log to each tracker."""
        kept = list(rows)  # an iterator would be exhausted by the first tracker
        for tracker in self.all:
            tracker.log_metrics(kept, at_ms=at_ms)

    def log_folder(self, folder: Path, *, path: str) -> None:
        """Log in each."""
        for tracker in self.all:
            tracker.log_folder(folder, path=path)

    def log_image(self, file: Path, *, key: str, step: int) -> None:
        """Log in each."""
        for tracker in self.all:
            tracker.log_image(file, key=key, step=step)

    def log_llm_calls(self, calls: Sequence[LlmCall]) -> None:
        """Only the first has traces."""
        self.first.log_llm_calls(calls)

    def register(self, *, name: str, path: str, description: str, tags: dict[str, str]) -> str | None:
        """Register in the first."""
        return self.first.register(name=name, path=path, description=description, tags=tags)

    def has_artifacts(self, run_id: str, paths: Sequence[str]) -> bool:
        """Ask the first."""
        return self.first.has_artifacts(run_id, paths)

    def has_version(self, name: str, version: str) -> bool:
        """Ask the first."""
        return self.first.has_version(name, version)

    def find_alias(self, name: str, alias: str) -> Version | None:
        """Ask the first."""
        return self.first.find_alias(name, alias)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Only the first has a registry."""
        self.first.set_alias(name, alias, version)

    def remove_alias(self, name: str, alias: str) -> None:
        """Only the first has a registry."""
        self.first.remove_alias(name, alias)

    def finish(self, *, is_failed: bool) -> None:
        """Close every tracker, even if one fails, then raise the first error."""
        errors = []
        for tracker in self.all:
            try:
                tracker.finish(is_failed=is_failed)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
