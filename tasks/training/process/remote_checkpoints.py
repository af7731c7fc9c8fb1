"""Checkpoints in the store, so that a worker with an empty disk resumes where another one ended.

`03-training/<stage key>/resume/step-00000100/`: the files of a checkpoint, its manifest last. Beside them lie the
retained best weights and the sample grids of earlier steps, which the finished model is published with.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from tasks.errors import ArtifactCorrupt, LeaseLost, LikenessError
from tasks.services.store.base import Store
from tasks.stage.digests import digest_file, load_signed
from tasks.stage.files import PART_PREFIX
from tasks.training.config import TrainingConfig
from tasks.training.process.checkpoint_files import (
    MANIFEST,
    NAME,
    CheckpointManifest,
    link_checkpoint,
    list_checkpoints,
    step_of,
)
from tasks.training.process.worker_spec import RunFolder

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2


class RemoteCheckpoints:
    """The checkpoints of one training in the store."""

    def __init__(self, store: Store, prefix: str, run: RunFolder) -> None:
        self.store = store
        self.prefix = f"{prefix}/resume"
        self.run = run

    def list_steps(self, kind: str) -> list[int]:
        """Return the steps of complete checkpoints, newest first. `kind` is `checkpoints` or `best`."""
        keys = self.store.list_keys(f"{self.prefix}/{kind}/")
        names = [key.split("/")[-2] for key in keys if key.endswith(f"/{MANIFEST}")]
        return sorted((int(name.removeprefix("step-")) for name in names if NAME.fullmatch(name)), reverse=True)

    def fetch(self) -> int | None:
        """Download the newest checkpoint that verifies, unless a local one is as new; return its step.

        Damaged ones are skipped with a warning. Raises ServiceUnavailable where the store can't be reached: training
        from the first step would lose what another machine has computed.
        """
        local = [step_of(path) for path in list_checkpoints(self.run.checkpoints)]
        newest_local = max(local, default=0)
        for step in self.list_steps("checkpoints"):
            if step <= newest_local:
                return None
            if self._fetch_checkpoint("checkpoints", self.run.checkpoints, step):
                # Those of later steps are written again when these steps are trained again.
                for best in self.list_steps("best"):
                    if best <= step and not (self.run.best / f"step-{best:08d}" / MANIFEST).exists():
                        self._fetch_checkpoint("best", self.run.best, best)
                for key in self.store.list_keys(f"{self.prefix}/samples/"):
                    self._fetch_sample(key)
                return step
        return None

    def _fetch_checkpoint(self, kind: str, folder: Path, step: int) -> bool:
        """Download one checkpoint and return whether it verifies. It is visible once it is complete."""
        name = f"step-{step:08d}"
        staged = folder / f"{PART_PREFIX}{name}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            data = self.store.find_bytes(f"{self.prefix}/{kind}/{name}/{MANIFEST}")
            if data is None:  # another process has replaced it by a newer one
                return False
            manifest = load_signed(CheckpointManifest, data)
            for file, sha256 in manifest.files.items():
                if "/" in file or file.startswith("."):
                    raise ArtifactCorrupt(f"{file!r} is not a plain file name")
                self.store.get_file(f"{self.prefix}/{kind}/{name}/{file}", staged / file)
                if digest_file(staged / file) != sha256:
                    raise ArtifactCorrupt(f"{file} differs from its manifest")
            (staged / MANIFEST).write_bytes(data)
            os.replace(staged, folder / name)
        except ArtifactCorrupt as error:
            log.warning("checkpoint %s in the store is damaged (%s); trying the one before", name, error)
            return False
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return True

    def _fetch_sample(self, key: str) -> None:
        path = self.run.samples / key.rsplit("/", 1)[-1]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.store.get_file(key, path)

    def upload_newest(self, *, num_kept: int, check: Callable[[], None]) -> int | None:
        """Upload the newest local checkpoint and what belongs to it, then delete all but the newest `num_kept` there.

        Returns its step; None where there is nothing new. `check` raises LeaseLost where another process trains.
        """
        found = list_checkpoints(self.run.checkpoints)
        steps = self.list_steps("checkpoints")
        if not found or step_of(found[0]) in steps:
            return None
        # Best weights and samples first: the checkpoint's manifest makes all of it visible.
        best = {step_of(path): path for path in list_checkpoints(self.run.best)}
        remote_best = self.list_steps("best")
        for step, path in best.items():
            if step not in remote_best:
                self._upload_checkpoint("best", path, check=check)
        stored = {key.rsplit("/", 1)[-1] for key in self.store.list_keys(f"{self.prefix}/samples/")}
        for path in sorted(self.run.samples.glob("*.png")):
            if path.name not in stored:
                self.store.put_file(f"{self.prefix}/samples/{path.name}", path)
        self._upload_checkpoint("checkpoints", found[0], check=check)
        for step in [step for step in remote_best if step not in best]:
            self._delete("best", step)
        for step in self.list_steps("checkpoints")[num_kept:]:
            self._delete("checkpoints", step)
        return step_of(found[0])

    def _upload_checkpoint(self, kind: str, path: Path, *, check: Callable[[], None]) -> None:
        """Upload one checkpoint, its manifest last."""
        # Links, so that training may delete the checkpoint meanwhile: it keeps only the newest few.
        with link_checkpoint(path) as linked:
            for file in sorted(linked.iterdir()):
                if file.name != MANIFEST:
                    check()
                    self.store.put_file(f"{self.prefix}/{kind}/{path.name}/{file.name}", file)
            check()
            self.store.put_bytes(f"{self.prefix}/{kind}/{path.name}/{MANIFEST}", (linked / MANIFEST).read_bytes())

    def _delete(self, kind: str, step: int) -> None:
        """Delete one checkpoint, its manifest first, so that a partly deleted one is never read."""
        name = f"{self.prefix}/{kind}/step-{step:08d}/"
        for key in sorted(self.store.list_keys(name), key=lambda key: not key.endswith(f"/{MANIFEST}")):
            self.store.delete(key)

    def delete_all(self) -> None:
        """Delete everything that only served to resume; manifests first."""
        for key in sorted(self.store.list_keys(f"{self.prefix}/"), key=lambda key: not key.endswith(f"/{MANIFEST}")):
            self.store.delete(key)


class CheckpointUploader:
    """Uploads checkpoints in a background thread, so that training never waits for the store.

    Leaving the block by an exception uploads the last checkpoint too, for at most `training.grace_seconds`; after
    success there is nothing left to resume.
    """

    def __init__(self, remote: RemoteCheckpoints, config: TrainingConfig, *, check: Callable[[], None]) -> None:
        self.remote = remote
        self.config = config
        self.check = check
        self.is_due = threading.Event()
        self.is_closing = False
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> "CheckpointUploader":
        """Start the thread."""
        if self.config.upload_checkpoints:
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the thread, after the last checkpoint where training did not finish."""
        if not self.config.upload_checkpoints:
            return
        if kind is not None:
            self.is_due.set()
        self.is_closing = True
        self.thread.join(self.config.grace_seconds if kind is not None else None)
        if self.thread.is_alive():
            log.warning(
                "the last checkpoint was not uploaded in time: another machine would resume from an earlier one"
            )

    def notify(self) -> None:
        """Upload what is newest now. A checkpoint that is replaced before its turn is skipped."""
        self.is_due.set()

    def run(self) -> None:
        """Upload whenever a checkpoint was written, until closed."""
        limit = self.config.checkpoints_total_limit
        while True:
            while not self.is_due.wait(POLL_SECONDS):
                if self.is_closing:
                    return
            self.is_due.clear()
            try:
                self.remote.upload_newest(num_kept=limit, check=self.check)
            except LeaseLost:  # the supervisor notices too, and ends training
                return
            except (LikenessError, OSError) as failure:
                log.warning("a checkpoint was not uploaded; the next one will be: %s", failure)
