"""Pruning: a trial whose validation is behind that of earlier trials stops, with its training saved."""

from collections.abc import Callable
from pathlib import Path

from conf.compose import compute_config_digest
from conf.schema import RunConfig
from flows.runs.records import list_run_folders, read_summary
from tasks.errors import TrainingStopped
from tasks.stage.digests import load_lines
from tasks.stage.progress import ProgressView


class TrialPruned(TrainingStopped):
    """A trial was pruned; its training is saved, as that of any run that is stopped."""


class ValidationTail:
    """Reads the validation values of a run's training from the events of its worker."""

    def __init__(self, config: RunConfig, should_prune: Callable[[int, float, float | None], bool]) -> None:
        self.output = Path(config.output_dir).absolute()
        self.digest = compute_config_digest(config)
        self.should_prune = should_prune
        self.path: Path | None = None
        self.position = 0
        self.reason = ""

    def read(self) -> bool:
        """Pass new validation values on; return whether the trial is pruned."""
        self.path = self.path or self.find_events()
        if self.path is None or not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self.position)
            data = file.read()
        end = data.rfind(b"\n") + 1  # the worker may be in the middle of a line
        self.position += end
        for event in load_lines(data[:end]):
            loss = None if event is None else event.get("validation_loss")
            if event is None or not isinstance(loss, int | float):
                continue
            similarity = event.get("validation_similarity")
            found = float(similarity) if isinstance(similarity, int | float) else None
            step = int(event["step"])
            if self.should_prune(step, float(loss), found):
                self.reason = f"pruned at step {step}: its validation is behind the median of earlier trials"
                return True
        return False

    def find_events(self) -> Path | None:
        """Return the event file of the run that is training with this configuration."""
        for folder in reversed(list_run_folders(self.output)):
            summary = read_summary(folder)
            if summary.status == "running" and summary.config_digest == self.digest and "training" in summary.stages:
                return self.output / "work" / "training" / summary.stages["training"].key / "events.jsonl"
        return None


class PruningProgress:
    """Shows progress, and raises TrialPruned from the training's own reports once the trial is pruned."""

    def __init__(self, view: ProgressView, tail: ValidationTail) -> None:
        self.view = view
        self.tail = tail

    def update(self, name: str, done: int, total: int, *, detail: str = "") -> None:
        """Show progress; the training's supervisor calls this for every row of the loss log."""
        self.view.update(name, done, total, detail=detail)
        if name == "training" and done < total and self.tail.read():
            raise TrialPruned(self.tail.reason)

    def note(self, text: str) -> None:
        """Print one line."""
        self.view.note(text)

    def close(self) -> None:
        """Leave the view to whoever opened it."""
