"""`likeness publish`, `promote` and `demote`: a run's model copied elsewhere, and the champion moved by hand."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from flows.cli.results.runs import find_run
from flows.runs.promotion import CHAMPION, Contender, promote
from flows.runs.records import PastRun, read_run
from tasks.errors import ArtifactCorrupt, ConfigError
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.publishing import Publication
from tasks.manifests.run import RunManifests
from tasks.manifests.scoring import Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel
from tasks.publishing.gate import find_blockers
from tasks.services.config import StoreConfig
from tasks.services.store.base import Store
from tasks.services.store.open import open_store
from tasks.services.tracking.base import Tracker
from tasks.services.tracking.open import open_tracker
from tasks.stage.cache import M, fetch_folder, find_manifest

PUBLISHED = "likeness.json"
"""The manifest of a published folder, written last: a folder without it is incomplete."""


def find_registered(run: PastRun) -> tuple[str, str, Tracker]:
    """Return the name and version that a run registered, and its tracker. Raises ConfigError where there is none."""
    name = run.summary.run_id
    run.find_stage_key("publishing")
    registered = run.summary.registered
    if registered is None or registered.model is None or registered.version is None:
        raise ConfigError(f"run {name} registered no model; run it again with publishing=registry tracking=mlflow")
    tracker = open_tracker(run.config.tracking, folder=Path(run.config.output_dir))
    tracker.check()
    if not tracker.has_version(registered.model, registered.version):
        raise ConfigError(f"version {registered.version} of {registered.model} is gone; run {name} again")
    return registered.model, registered.version, tracker


def promote_run(output: Path, name: str, *, is_forced: bool) -> int:
    """Move the alias to a run's model; return 1 where gate or comparison speak against it."""
    run = read_run(find_run(output, name))
    model, version, tracker = find_registered(run)
    if is_forced:
        tracker.set_alias(model, CHAMPION, version)
        print(f"{model} version {version} is now the champion (forced)")
        return 0
    store = open_store(run.config.store)
    blockers = find_blockers(load_manifests(store, run), run.config.publishing.gate)
    keys = {stage: run.find_stage_key(stage) for stage in ("evaluation", "subject", "scoring")}
    found = promote(tracker, store, Contender(model, version, keys, tuple(blockers)))
    if found.is_champion:
        print(f"{model} version {version} is the champion")
        return 0
    print(f"{model} version {version} is not the champion:")
    for blocker in found.blockers:
        print(f"  {blocker}")
    print("use --force to promote it anyway")
    return 1


def demote_run(output: Path, name: str) -> int:
    """Remove the alias from a run's model. Raises ConfigError where another version has it."""
    model, version, tracker = find_registered(read_run(find_run(output, name)))
    champion = tracker.find_alias(model, CHAMPION)
    if champion is None or champion.version != version:
        held = f"version {champion.version} is" if champion else "no version is"
        raise ConfigError(f"{model} version {version} is not the champion; {held}")
    tracker.remove_alias(model, CHAMPION)
    print(f"{model} has no champion; promote another run: likeness promote RUN")
    return 0


def load_manifests(store: Store, run: PastRun) -> RunManifests:
    """Return the manifests of a finished run. Raises ConfigError where one is missing."""

    def load(kind: type[M], stage: str) -> M:
        found = find_manifest(store, kind, stage=stage, key=run.find_stage_key(stage))
        if found is None:
            raise ConfigError(f"the {stage} of run {run.summary.run_id} is missing from the store; run it again")
        return found

    return RunManifests(
        load(SubjectSet, "subject"), load(ClassImageSet, "prior"), load(TunedModel, "training"),
        load(Evaluation, "evaluation"), load(Scorecard, "scoring"),
    )  # fmt: skip


def publish_run(output: Path, name: str, to: str, *, on_progress: Callable[[int, int], None]) -> int:
    """Copy a run's model and report to a folder or bucket, each file verified there, the manifest last.

    Raises:
        ConfigError: the run did not finish, or the destination holds another model.
        ArtifactCorrupt: a file arrived changed.

    """
    run = read_run(find_run(output, name))
    key = run.find_stage_key("publishing")
    store, destination = open_store(run.config.store), open_destination(to, run.config.store)
    publication = find_manifest(store, Publication, stage="publishing", key=key)
    if publication is None:
        raise ConfigError(f"the model of run {run.summary.run_id} is missing from the store; run it again")
    refs = [*publication.model, publication.report]
    files = {ref.key.split(f"/{key}/", 1)[1]: ref for ref in refs}
    told = {
        "run": run.summary.run_id,
        "files": {path: {"sha256": ref.sha256, "size_bytes": ref.size_bytes} for path, ref in sorted(files.items())},
    }
    held = destination.find_bytes(PUBLISHED)
    if held is not None and read_files(held) != told["files"]:
        raise ConfigError(f"{to} holds another model ({PUBLISHED}); choose an empty folder or prefix")
    with tempfile.TemporaryDirectory() as scratch:
        for number, (path, ref) in enumerate(files.items()):
            on_progress(number, len(files))
            fetch_folder(store, [ref], below=key, folder=Path(scratch))
            destination.put_file(path, Path(scratch) / path)
            if destination.compute_sha256(path) != ref.sha256:
                raise ArtifactCorrupt(f"{destination.describe(path)} arrived changed; publish again")
        on_progress(len(files), len(files))
    destination.put_bytes(PUBLISHED, json.dumps(told, indent=1).encode())
    print(f"{destination.describe('model')}  {len(files)} files, verified")
    return 0


def open_destination(to: str, config: StoreConfig) -> Store:
    """Return the store of a folder or `s3://bucket/prefix`; a bucket is reached as the run's store is configured."""
    bucket = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", to)
    if bucket:
        changes = {"kind": "s3", "bucket": bucket[1], "prefix": (bucket[2] or "").strip("/")}
        return open_store(config.model_copy(update=changes))
    if "://" in to:
        raise ConfigError(f"--to {to}: give a folder or s3://BUCKET/PREFIX")
    return open_store(config.model_copy(update={"kind": "local", "folder": str(Path(to).expanduser().absolute())}))


def read_files(data: bytes) -> object:
    """Return what a published folder's manifest lists; None for one that is damaged."""
    try:
        told = json.loads(data)
    except ValueError:
        return None
    return told.get("files") if isinstance(told, dict) else None
