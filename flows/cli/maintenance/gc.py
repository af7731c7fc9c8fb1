"""`likeness gc`: unreferenced stages and leftovers of interrupted runs. Dry run by default."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.runs.records import list_run_folders, read_run, read_summary
from tasks.errors import ConfigError
from tasks.services.config import find_cache
from tasks.services.store.base import Store, Upload
from tasks.services.store.lease import LEASES, read_lease
from tasks.services.store.local import LocalStore
from tasks.services.store.open import open_store
from tasks.stage.cache import PREFIXES
from tasks.stage.files import PART_PREFIX

HOUR, DAY = 3_600.0, 86_400.0
PART_AGE = HOUR  # a younger one may belong to a write in progress
UPLOAD_AGE = DAY  # the same; a large model may take hours at a bounded rate
MAX_DAYS = 36_500
# Copies and latents: made again when they are missing.
CACHES = ("models", "published", "candidates", "latents")


@dataclass(frozen=True)
class Item:
    """Something that can be removed."""

    kind: str
    name: str
    size_bytes: int
    path: Path | None = None
    keys: tuple[str, ...] = ()
    """Objects in the store, where it is not a path."""
    upload: Upload | None = None


def collect_garbage(output: Path, *, days: float, is_deleting: bool) -> list[Item]:
    """Return what can be removed, and remove it if `is_deleting`: unreferenced and older than `days`.

    Replies of LLMs are never removed: they were paid for.

    Raises:
        ConfigError: there are no runs, so references are unknown.

    """
    folders = list_run_folders(output)
    if not folders:
        raise ConfigError(f"no runs in {output}; name the folder of your runs with --output-dir")
    if not 0 <= days <= MAX_DAYS:
        raise ConfigError(f"--days {days:g}: must be between 0 and {MAX_DAYS:,}")
    if any(read_summary(folder).status == "running" for folder in folders):
        days = max(days, 1.0)  # what a running run has written so far is younger
    store = find_store(folders)
    limit = time.time() - days * DAY
    # Stages are removed only where every reference to them is known; leftovers are safe in any case.
    is_kept = bool(explain_kept_stages(output))
    stages = [] if is_kept else [*list_stages(store, list_referenced(folders), limit)]
    items = [
        *stages,
        *([] if is_kept else list_dangling_notes(store, {item.name for item in stages})),
        *list_leftovers(output, store),
        *list_stale_leases(store),
        *list_stale_uploads(store),
        *list_work(output, limit),
    ]
    if is_deleting:
        for item in items:
            remove(item, store)
    return items


def explain_kept_stages(output: Path) -> str:
    """Return why no stage may be removed now, or an empty string."""
    folders = list_run_folders(output)
    for folder in folders:
        status = read_summary(folder).status
        if status == "running":
            return f"run {folder.name} is running and may use any stage; try again after it has ended"
        if status == "damaged":
            return f"the references of run {folder.name} are unknown: its summary.json is damaged; remove that folder"
    if not is_own_store(find_store(folders), output):
        return f"the store is outside {output} and may be shared with runs of other folders"
    return ""


def find_store(folders: list[Path]) -> Store:
    """Return the store of the newest run whose configuration can be read."""
    for folder in reversed(folders):
        try:
            return open_store(read_run(folder).config.store)
        except ConfigError:
            continue
    raise ConfigError("cannot find the store: no run's configuration can be read")


def is_own_store(store: Store, output: Path) -> bool:
    """Whether a store lies in the output folder, so that no runs but those there refer to it."""
    return isinstance(store, LocalStore) and store.root.resolve().is_relative_to(output.resolve())


def list_referenced(folders: list[Path]) -> set[str]:
    """Return the store's stage folders that runs refer to."""
    found = set()
    for folder in folders:
        for name, stage in read_summary(folder).stages.items():
            if name in PREFIXES:
                found.add(f"{PREFIXES[name]}/{stage.key}")
    return found


def list_stages(store: Store, referenced: set[str], limit: float) -> Iterator[Item]:
    """Yield unreferenced stage folders without recent writes."""
    for stage, prefix in PREFIXES.items():
        groups: dict[str, list[tuple[str, int, float]]] = {}
        for item in store.list_objects(f"{prefix}/"):
            groups.setdefault(name_stage_folder(item.key), []).append((item.key, item.size_bytes, item.modified))
        for name, objects in groups.items():
            if any("/batches/" in key for key, _, _ in objects):
                continue  # a batch job's state: its replies may be paid for and not yet read
            # The newest object decides: a stage that is being written has old and new ones.
            if name not in referenced and max(modified for _, _, modified in objects) < limit:
                keys = tuple(key for key, _, _ in objects)
                yield Item(f"{stage} that no run refers to", name, sum(size for _, size, _ in objects), keys=keys)
            elif name in referenced:
                for key, size, _ in objects:
                    if key.endswith(".quarantined"):
                        yield Item("quarantined", key, size, keys=(key,))
                # Checkpoints are deleted once training is finished: these are of one that nobody resumed.
                resume = [item for item in objects if item[0].startswith(f"{name}/resume/")]
                if resume and max(modified for _, _, modified in resume) < limit:
                    keys = tuple(key for key, _, _ in resume)
                    yield Item(
                        "checkpoints of an unfinished training", name, sum(item[1] for item in resume), keys=keys
                    )


def list_dangling_notes(store: Store, removed: set[str]) -> Iterator[Item]:
    """Yield notes of base models' samples whose evaluation is gone, or will be."""
    from tasks.evaluation.sampling import BASE_SAMPLES, read_note

    folders = {name_stage_folder(key) for key in store.list_keys(f"{PREFIXES['evaluation']}/")} - removed
    for item in store.list_objects(f"{BASE_SAMPLES}/"):
        image = read_note(store, item.key)
        if image is None or name_stage_folder(image.key) not in folders:
            yield Item("note of a sample that is gone", item.key, item.size_bytes, keys=(item.key,))


def name_stage_folder(key: str) -> str:
    """Return `<prefix>/<stage_key>` of an object's key: the folder of one stage."""
    return "/".join(key.split("/")[:2])


def list_stale_leases(store: Store) -> Iterator[Item]:
    """Yield leases whose holder is gone; the next holder would take them over."""
    for key in store.list_keys(f"{LEASES}/"):
        lease = read_lease(store, key)
        # By this host's clock; no clock is off by a day, which no lease lives.
        if lease is not None and (lease.has_ended() or time.time() - lease.expires_at > DAY):
            yield Item("lease of a process that is gone", key, 0, keys=(key,))


def list_stale_uploads(store: Store) -> Iterator[Item]:
    """Yield uploads in parts that a killed process left behind; the bucket bills their parts."""
    for upload in store.list_uploads():
        if time.time() - upload.begun > UPLOAD_AGE:
            yield Item("abandoned upload", upload.key, 0, upload=upload)


def list_leftovers(output: Path, store: Store) -> Iterator[Item]:
    """Yield temporary files of interrupted writes."""
    roots = [output]
    if isinstance(store, LocalStore) and not is_own_store(store, output):  # else it lies below `output`
        roots.append(store.root)
    for root in roots:
        for path in root.rglob(f"{PART_PREFIX}*"):
            if measure_age(path) > PART_AGE:
                yield Item("abandoned temporary file", str(path), measure_size(path), path=path)


def list_work(output: Path, limit: float) -> Iterator[Item]:
    """Yield local copies, and training state that no run resumed."""
    work = output / "work"
    for name in CACHES:
        for path in (work / name).glob("*"):
            if path.stat().st_mtime < limit:
                yield Item(f"local copy ({name})", str(path), measure_size(path), path=path)
    for path in find_cache(output / "store").glob("*"):
        if not path.name.startswith(PART_PREFIX) and path.stat().st_mtime < limit:
            yield Item("local copy (bucket)", str(path), measure_size(path), path=path)
    for path in (work / "training").glob("*"):
        # Not the folder's own mtime, which writes to files below it don't change.
        if path.is_dir() and newest(path) < limit:
            yield Item("training state", str(path), measure_size(path), path=path)
    for path in (work / "training").glob("*/checkpoints/.bad-*"):
        yield Item("quarantined", str(path), measure_size(path), path=path)


def measure_age(path: Path) -> float:
    """Return how long ago a file was changed, in seconds; 0 for one that is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def newest(folder: Path) -> float:
    """Return when anything in a folder was last changed."""
    return max((path.stat().st_mtime for path in [folder, *folder.rglob("*")] if path.exists()), default=0.0)


def measure_size(path: Path) -> int:
    """Return the bytes that removing a path frees; a file with further hard links frees none."""
    # Local copies are hard links of the store's objects where the file system allows; removing one name frees nothing.
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files if file.stat().st_nlink == 1)


def remove(item: Item, store: Store) -> None:
    """Remove one item; manifests first, so that a partly removed stage counts as incomplete."""
    for key in sorted(item.keys, key=lambda key: not key.endswith("/manifest.json")):
        store.delete(key)
    if item.upload is not None:
        store.abort_upload(item.upload)
    if item.path is not None and item.path.is_dir():
        shutil.rmtree(item.path, ignore_errors=True)
    elif item.path is not None:
        item.path.unlink(missing_ok=True)


def print_garbage(output: Path, *, days: float, is_deleting: bool) -> None:
    """Collect garbage and print what is or would be removed."""
    from rich.console import Console
    from rich.table import Table

    items = collect_garbage(output, days=days, is_deleting=is_deleting)
    table = Table(box=None, header_style="bold")
    for title in ("item", "count", "MB"):
        table.add_column(title, justify="left" if title == "item" else "right")
    for kind in dict.fromkeys(item.kind for item in items):
        sizes = [item.size_bytes for item in items if item.kind == kind]
        table.add_row(kind, str(len(sizes)), f"{sum(sizes) / 1e6:.1f}")
    Console(width=120).print(table)
    total = sum(item.size_bytes for item in items) / 1e6
    if reason := explain_kept_stages(output):
        print(f"no stage is removed: {reason}")
    if is_deleting:
        print(f"{len(items)} removed, {total:.1f} MB freed")
    else:
        print(f"{len(items)} removable, {total:.1f} MB; nothing was removed, add --delete")
