"""`likeness publish`, `promote` and `demote`: a run's model copied elsewhere, and the champion moved by hand."""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.results.published_samples import FOLDER, SampleFiles, find_signed, list_samples
from flows.cli.results.runs import find_run
from flows.runs.promotion import CHAMPION, Contender, promote
from flows.runs.records import PastRun, list_run_folders, read_run
from tasks.errors import ArtifactCorrupt, ConfigError
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.publishing import Publication
from tasks.manifests.run import RunManifests
from tasks.manifests.scoring import Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel
from tasks.publishing.gate import find_blockers
from tasks.publishing.report.placement import NearbyModel, list_names, place_report
from tasks.publishing.report.usage import BESIDE_REPORT, ModelPlace, UsedModel, write_snippets
from tasks.redaction import redact
from tasks.services.config import StoreConfig
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tasks.services.store.open import open_store
from tasks.services.tracking.base import Tracker
from tasks.services.tracking.open import open_tracker
from tasks.stage.cache import M, fetch_folder, find_manifest, read_verified
from tasks.stage.digests import digest_file
from tasks.stage.files import make_part_prefix, remove_stale_parts, staged_file, write_atomic

if TYPE_CHECKING:
    from flows.cli.results.images.credentials import ContentCredentials

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
    run = read_run(find_run(output, name, is_trained=True))
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
    model, version, tracker = find_registered(read_run(find_run(output, name, is_trained=True)))
    champion = tracker.find_alias(model, CHAMPION)
    if champion is None or champion.version != version:
        held = f"version {champion.version} is" if champion else "no version is"
        raise ConfigError(f"{model} version {version} is not the champion; {held}")
    tracker.remove_alias(model, CHAMPION)
    print(f"{model} has no champion; promote another run: likeness promote RUN")
    return 0


def load_manifests(store: Store, run: PastRun) -> RunManifests:
    """Return the manifests of a finished run. Raises ConfigError where one is missing."""
    load = partial(load_manifest, store=store, run=run)
    return RunManifests(
        load(SubjectSet, "subject"), load(ClassImageSet, "prior"), load(TunedModel, "training"),
        load(Evaluation, "evaluation"), load(Scorecard, "scoring"),
    )  # fmt: skip


def load_manifest(kind: type[M], stage: str, *, store: Store, run: PastRun) -> M:
    """Return a stage's manifest. Raises ConfigError where it is missing."""
    found = find_manifest(store, kind, stage=stage, key=run.find_stage_key(stage))
    if found is None:
        raise ConfigError(f"the {stage} of run {run.summary.run_id} is missing from the store; run it again")
    return found


@dataclass(frozen=True)
class Destination:
    """Where a model goes, and whether samples go along."""

    to: str
    has_samples: bool = False
    credentials: "ContentCredentials | None" = None
    """Samples are signed with them."""


def publish_run(output: Path, name: str, target: Destination, *, on_progress: Callable[[int, int], None]) -> int:
    """Copy a run's model and report to a folder or bucket, each file verified there, the manifest last.

    Raises:
        ConfigError: the run did not finish, or the destination belongs to a store or run, or is in use.
        ArtifactCorrupt: checksum mismatch at the destination.

    """
    run = read_run(find_run(output, name, is_trained=True))
    key = run.find_stage_key("publishing")
    config, work = run.config.store, Path(run.config.output_dir) / "work"
    store = open_store(config)
    publication = load_manifest(Publication, "publishing", store=store, run=run)
    destination = open_destination(target.to, config, output=Path(run.config.output_dir))
    page = write_page(store, run, publication, destination=destination)
    report = publication.report.model_copy(update={"sha256": hashlib.sha256(page).hexdigest(), "size_bytes": len(page)})
    files = {ref.key.split(f"/{key}/", 1)[1]: ref for ref in (*publication.model, report)}
    samples = SampleFiles()
    if target.has_samples:
        evaluation = load_manifest(Evaluation, "evaluation", store=store, run=run)
        samples = SampleFiles(list_samples(evaluation), target.credentials)
    listed = check_contents(destination, describe_files(files), samples.refs, to=target.to)
    warn_of_signatures(destination, samples, to=target.to)
    if samples.refs:  # no two signatures are the same: what is listed no longer holds
        destination.delete(PUBLISHED)
        listed = {}
    work.mkdir(parents=True, exist_ok=True)
    all_files = {**files, **samples.refs}
    with tempfile.TemporaryDirectory(dir=work, prefix=make_part_prefix()) as scratch:
        for number, (path, ref) in enumerate(all_files.items()):
            on_progress(number, len(all_files))
            staged, written = Path(scratch) / path, ref
            if path in samples.refs:
                data, written = samples.read(store, path)
                write_atomic(staged, data)
            elif ref == report:
                write_atomic(staged, page)
            else:
                fetch_folder(store, [ref], below=key, folder=Path(scratch))
            copy_verified(staged, destination, path, ref=written)
            listed |= describe_files({path: written})
        on_progress(len(all_files), len(all_files))
    manifest = {"run": run.summary.run_id, "files": dict(sorted(listed.items()))}
    destination.put_bytes(PUBLISHED, json.dumps(manifest, indent=1).encode())
    print(f"{destination.describe('model')}  {len(all_files)} files, verified")
    return 0


def warn_of_signatures(destination: Store, samples: SampleFiles, *, to: str) -> None:
    """Print a line where unsigned samples replace signed ones."""
    signed = [] if samples.credentials else find_signed(destination, samples.refs)
    if signed:
        print(
            f"warning: {len(signed)} of {len(samples.refs)} samples in {to} have content credentials (C2PA), which "
            "these replace unsigned; --c2pa-certificate and --c2pa-key sign them",
            file=sys.stderr,
        )


def describe_files(files: Mapping[str, ObjectRef]) -> dict[str, object]:
    """Return what the manifest says of files."""
    return {path: {"sha256": ref.sha256, "size_bytes": ref.size_bytes} for path, ref in files.items()}


def write_page(store: Store, run: PastRun, publication: Publication, *, destination: Store) -> bytes:
    """Return the report with snippets and links for a model that lies beside it at the destination."""
    there, diffusion, subject = destination.describe("model"), run.config.diffusion, run.summary.subject
    assert subject is not None  # of a finished run
    used = UsedModel(
        subject.class_noun, subject.identifier_token, diffusion.family, run.config.training.method,
        diffusion.pretrained_model_name_or_path, diffusion.revision,
    )  # fmt: skip
    place = BESIDE_REPORT  # the folder is handed on: where it lies now is nobody else's path
    if not isinstance(destination, LocalStore):
        endpoint = run.config.store.endpoint_url
        words = ["aws", "s3", "cp", "--recursive", there, "model"]
        words += ["--endpoint-url", redact(endpoint)] if endpoint else []
        place = ModelPlace("model", shlex.join(words))
    model = NearbyModel(write_snippets(used, place), "../model", list_names(publication.model))
    return place_report(read_verified(store, publication.report).decode(), model).encode()


def copy_verified(source: Path, destination: Store, path: str, *, ref: ObjectRef) -> None:
    """Move one file to the destination and hash what was written there. Raises ArtifactCorrupt."""
    destination.put_file(path, source)
    source.unlink()  # before the next file: a model of gigabytes is never staged whole
    if isinstance(destination, LocalStore):
        written = digest_file(destination.path(path))
    else:  # an object's metadata only repeats what the upload claimed
        destination.get_file(path, source)
        written = digest_file(source)
        source.unlink()
    if written != ref.sha256:
        raise ArtifactCorrupt(f"{destination.describe(path)}: checksum mismatch at the destination; publish again")


def check_contents(
    destination: Store, files: Mapping[str, object], samples: Mapping[str, object], *, to: str
) -> dict[str, object]:
    """Return the samples that the destination's manifest lists.

    Raises:
        ConfigError: it is neither empty, nor holds this model or the beginning of its copy.

    """
    found = destination.find_bytes(PUBLISHED)
    listed = {} if found is None else read_files(found)
    kept = {path: facts for path, facts in listed.items() if path.startswith(FOLDER)}
    if found is not None:
        if {path: facts for path, facts in listed.items() if path not in kept} != files:
            raise ConfigError(f"{to} already contains another model ({PUBLISHED}); choose an empty folder or prefix")
    else:
        keys = destination.list_keys("")
        # Samples of a copy that was interrupted may be there, though none are copied now.
        has_model = not files.keys().isdisjoint(keys)
        others = (key for key in keys if key not in {*files, *samples} and not (has_model and key.startswith(FOLDER)))
        other = next(others, None)
        if other is not None:
            raise ConfigError(f"{to} is not empty ({other}); choose an empty folder or prefix")
    if isinstance(destination, LocalStore):
        for path in (*files, *samples):
            destination.path(path)
        remove_stale_parts(destination.root)
    return kept


class FolderDestination(LocalStore):
    """A folder outside the store: files are copies, which their owner may edit, and no links are followed."""

    def path(self, key: str) -> Path:
        """Return the file of a key. Raises ConfigError where a folder on the way is a symbolic link."""
        path = super().path(key)
        for folder in path.parents:
            if folder == self.root:
                break
            if folder.is_symlink():
                raise ConfigError(f"{folder} is a symbolic link; remove it or choose another destination")
        return path

    def put_file(self, key: str, path: Path) -> None:
        """Copy a file's content, with mode 0644: a hard link would let an edit of the copy change the store."""
        with staged_file(self.free_path(key), size_bytes=path.stat().st_size) as staged:
            shutil.copyfile(path, staged)


def open_destination(to: str, config: StoreConfig, *, output: Path) -> Store:
    """Return the store of a folder or `s3://bucket/prefix`; a bucket is reached as the run's store is configured.

    Raises:
        ConfigError: another kind of address, a folder that cannot be written, or one of a store or run.

    """
    bucket = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", to)
    if bucket:
        prefix = (bucket[2] or "").strip("/")
        check_prefix(to, bucket[1], prefix, config=config)
        return open_store(config.model_copy(update={"kind": "s3", "bucket": bucket[1], "prefix": prefix}))
    if not to.strip() or not to.isprintable() or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", to):
        raise ConfigError(f"--to {to!r}: give a folder or s3://BUCKET/PREFIX")
    try:
        root = Path(to).expanduser().resolve()
        check_folder(root, config, output=output)
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a home folder that is not known
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--to {to}: {reason}; give a folder that can be written") from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise ConfigError(f"--to {to}: not writable; give a folder that can be written")
    return FolderDestination(root)


def check_folder(root: Path, config: StoreConfig, *, output: Path) -> None:
    """Raise ConfigError for a folder that equals, lies in or contains the store's, a run's or the working folder."""
    stores = [Path(config.folder)] if config.kind == "local" and config.folder else []
    for folder in [*stores, output / "store", output / "work", *list_run_folders(output)]:
        own = folder.resolve()
        if root.is_relative_to(own) or own.is_relative_to(root):
            raise ConfigError(f"--to {root} overlaps {own}, which belongs to likeness; choose a folder elsewhere")


def check_prefix(to: str, bucket: str, prefix: str, *, config: StoreConfig) -> None:
    """Raise ConfigError for a prefix that equals, lies in or contains the store's."""
    if config.kind != "s3" or bucket != config.bucket:
        return
    own, other = Path(config.prefix.strip("/")), Path(prefix)
    # A store without a prefix uses folders such as `06-publishing`; others in the bucket are free.
    is_free = not own.parts and other.parts and not re.match(r"\d\d-", other.parts[0])
    if not is_free and (own.is_relative_to(other) or other.is_relative_to(own)):
        raise ConfigError(f"--to {to} overlaps the run's store, s3://{bucket}/{config.prefix}; choose another prefix")


def read_files(data: bytes) -> dict[str, object]:
    """Return what a published folder's manifest lists; nothing for one that is damaged."""
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    files = manifest.get("files") if isinstance(manifest, dict) else None
    return files if isinstance(files, dict) else {}
