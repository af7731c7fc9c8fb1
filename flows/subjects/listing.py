"""The subjects of a CSV file, of a folder of subject folders, or below a prefix of the store."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.compose import compile_request
from conf.groups import FIELDS
from conf.overrides import parse_override
from conf.request import RunRequest
from conf.subjects import (
    MAX_FILE_BYTES,
    MAX_SUBJECTS,
    SUBJECT_FILE,
    ManyRequest,
    SubjectFile,
    make_request,
    parse_subject_file,
)
from conf.trust import check_request
from tasks.csv_files import read_table
from tasks.errors import ConfigError, LikenessError, first_line
from tasks.redaction import clean_text, show_value
from tasks.services.store.base import Store, StoredObject
from tasks.services.store.local import LocalStore
from tasks.stage.digests import digest
from tasks.subject.photos.decoding import SUFFIXES
from tasks.subject.photos.ingest import list_source

COLUMNS = ("source", "class_noun")
ANY_FAULT = (LikenessError, OSError, RuntimeError, ValueError)
"""What one subject's files can raise; the others are not affected."""
STORE = "store:"


@dataclass(frozen=True)
class Subject:
    """One subject, as it was found."""

    name: str
    request: RunRequest | None = None
    """None for a subject that can't be run."""
    problem: str = ""
    """Why not."""
    is_incomplete: bool = False
    """Whether its folder is still being written: it is looked at again the next time."""
    key: str = ""
    """Digest of the request and of the photos' content: an equal subject is run once."""


@dataclass(frozen=True)
class Origin:
    """Where subjects are listed from."""

    request: ManyRequest
    store: Store
    roots: tuple[Path, ...] | None
    """Folders that paths must lie in; None: a person's terminal."""

    def is_settled(self, changed: Iterable[float]) -> bool:
        """Whether the newest of some files was written at least `settle_seconds` ago."""
        return time.time() - max(changed, default=0.0) >= self.request.settle_seconds

    def identify(self, name: str, request: RunRequest) -> Subject:
        """Check a subject's configuration, digest its photos, and return it."""
        config = compile_request(request, roots=self.roots)
        source = list_source(config.subject, self.store)
        if config.subject.source.startswith(STORE):
            prefix = config.subject.source.removeprefix(STORE)
            keys = [key for key in self.store.list_keys(prefix) if key.lower().endswith(SUFFIXES)]
            photos = [(key.rsplit("/", 1)[-1], self.store.compute_sha256(key) or "") for key in keys]
        else:
            photos = [(photo, hashlib.sha256(read()).hexdigest()) for photo, read in source.files]
        # Not where they lie, nor where results go: the same photos in another folder are the same subject.
        settings = config.model_dump(mode="json", exclude={"output_dir": True, "store": True, "subject": {"source"}})
        return Subject(name, request, key=digest([settings, sorted(photos)])[:32])


def list_subjects(origin: Origin) -> Iterator[Subject]:
    """Yield all subjects; one that can't be run carries its problem, and the others are not affected.

    Raises:
        ConfigError: there is no such source, or it names no subjects at all, or too many.

    """
    where = origin.request.subjects
    if where.startswith(STORE):
        found = list_stored(origin, where.removeprefix(STORE))
    elif "://" in where:
        raise ConfigError(
            f"{show_value(where)}: name the bucket by store=s3 store.bucket=..., and the folder as {STORE}PREFIX/"
        )
    elif Path(where).expanduser().is_dir():
        found = list_folders(origin, Path(where).expanduser().absolute())
    else:
        found = list_rows(origin, Path(where).expanduser().absolute())
    count, names = 0, dict[str, str]()
    for count, subject in enumerate(found, 1):
        if count > MAX_SUBJECTS:
            raise ConfigError(f"{where}: more than {MAX_SUBJECTS:,} subjects; divide them")
        if subject.key and subject.key in names:
            yield Subject(subject.name, problem=f"the same photos and settings as {names[subject.key]}")
            continue
        names[subject.key] = subject.name
        yield subject
    if not count and origin.request.wait:  # an empty inbox is none of a person's errors
        raise ConfigError(f"{where}: no subjects; a subject is a folder of photos with a {SUBJECT_FILE}")


def list_rows(origin: Origin, path: Path) -> Iterator[Subject]:
    """Yield one subject per line of a CSV file; columns other than source, class_noun and name are settings."""
    way_out = "the columns are source,class_noun, perhaps name, and settings such as training.max_train_steps"

    def check(header: list[str], where: str) -> list[str]:
        missing = [name for name in COLUMNS if name not in header]
        if missing or len(set(header)) < len(header):
            raise ConfigError(f"{where}: {f'no column {missing[0]}' if missing else 'duplicate column'}; {way_out}")
        return header

    for number, row in read_table(path, check=check, setting="subjects", way_out=way_out):
        cells = {name: cell.strip() for name, cell in row.items()}
        name = clean_text(cells.pop("name", "")) or f"line {number}"
        try:
            yield origin.identify(name, read_row(origin, path, cells))
        except ANY_FAULT as error:
            yield Subject(name, problem=f"{path.name}, line {number}: {explain(error)}")


def read_row(origin: Origin, path: Path, cells: dict[str, str]) -> RunRequest:
    """Return the request of one line; a relative folder is relative to the file. Raises ConfigError."""
    source, class_noun = cells.pop("source", ""), cells.pop("class_noun", "")
    if not source or not class_noun:
        raise ConfigError(f"no {'class_noun' if source else 'source'}")
    if source != "demo" and not source.startswith(STORE):
        source = str(path.parent / Path(source).expanduser())
    settings = dict(parse_override(f"{name}={cell}") for name, cell in cells.items() if cell)
    return make_request(origin.request.base, source=source, class_noun=class_noun, settings=settings)


def list_folders(origin: Origin, folder: Path) -> Iterator[Subject]:
    """Yield one subject per folder that holds a `subject.yaml`."""
    root = folder.resolve()
    for path in sorted(folder.glob(f"*/{SUBJECT_FILE}")):
        name = clean_text(path.parent.name)
        try:
            # A link could lead to any folder of the machine, and a FIFO would block.
            if path.resolve().parent.parent != root or not path.is_file():
                raise ConfigError(f"{SUBJECT_FILE} is no plain file of a folder here")
            described = parse_subject_file(read_bounded(path))
            # The time of the last change of the file itself: copies keep the time of modification of their originals.
            present = {file.name: file.stat().st_ctime for file in path.parent.iterdir() if file.is_file()}
            yield from describe_folder(origin, name, described, present=present, source=str(path.parent))
        except ANY_FAULT as error:
            yield Subject(name, problem=explain(error))


def read_bounded(path: Path) -> bytes:
    """Return at most a byte more than a description may have."""
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def list_stored(origin: Origin, prefix: str) -> Iterator[Subject]:
    """Yield one subject per folder of the store that holds a `subject.yaml`."""
    if not prefix.endswith("/"):
        raise ConfigError(f"{STORE}{show_value(prefix)[1:-1]}: end the prefix with /, as {STORE}subjects/")
    folders: dict[str, list[StoredObject]] = {}
    for item in origin.store.list_objects(prefix):
        name, sign, rest = item.key.removeprefix(prefix).partition("/")
        if sign and rest:
            folders.setdefault(name, []).append(item)
    for folder, items in sorted(folders.items()):
        start, name = f"{prefix}{folder}/", clean_text(folder)
        sizes = {item.key.removeprefix(start): item.size_bytes for item in items}
        if SUBJECT_FILE not in sizes:
            continue
        try:
            if sizes[SUBJECT_FILE] > MAX_FILE_BYTES:  # before it is read into memory
                raise ConfigError(f"{SUBJECT_FILE} has more than {MAX_FILE_BYTES:,} bytes")
            described = parse_subject_file(origin.store.find_bytes(start + SUBJECT_FILE) or b"")
            present = {item.key.removeprefix(start): find_change(origin.store, item) for item in items}
            yield from describe_folder(origin, name, described, present=present, source=f"{STORE}{start}")
        except ANY_FAULT as error:
            yield Subject(name, problem=explain(error))


def find_change(store: Store, item: StoredObject) -> float:
    """Return when an object was written: a copy into a local store's folder may keep an older time."""
    return (store.root / item.key).stat().st_ctime if isinstance(store, LocalStore) else item.modified


def describe_folder(
    origin: Origin, name: str, described: SubjectFile, *, present: dict[str, float], source: str
) -> Iterator[Subject]:
    """Yield the subject of a folder; incomplete where a photo is missing, or a file was written just now.

    Args:
        origin: where subjects are listed from.
        name: of the subject.
        described: its `subject.yaml`.
        present: when each file was written, by name.
        source: the folder, as a request names it.

    """
    missing = sorted(set(described.photos) - set(present))
    if missing or not origin.is_settled(present.values()):
        reason = f"{missing[0]} is missing" if missing else "a file was written just now"
        yield Subject(name, problem=reason, is_incomplete=True)
        return
    # Whoever may upload photos must not reach hosts, keys or folders, wherever the description is read.
    check_request({key: value for key, value in described.settings.items() if key not in FIELDS}, origin.roots or ())
    request = make_request(
        origin.request.base, source=source, class_noun=described.class_noun, settings=described.settings
    )
    yield origin.identify(name, request)


def explain(error: Exception) -> str:
    """Return an error as a reason."""
    return str(error) if isinstance(error, LikenessError) else f"{type(error).__name__}: {first_line(error)}"
