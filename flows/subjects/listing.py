"""The subjects of a CSV file, of a folder of subject folders, or below a prefix of the store."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.compose import compile_request
from conf.overrides import parse_override
from conf.request import RunRequest
from conf.subjects import MAX_SUBJECTS, SUBJECT_FILE, ManyRequest, SubjectFile, make_request, parse_subject_file
from tasks.csv_files import read_table
from tasks.errors import ConfigError, LikenessError
from tasks.redaction import clean_text, show_value
from tasks.services.store.base import Store, StoredObject
from tasks.stage.digests import digest
from tasks.subject.photos.ingest import list_source

COLUMNS = ("source", "class_noun")
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

    def is_settled(self, modified: Iterable[float]) -> bool:
        """Whether the newest of some files is older than the settling time."""
        return time.time() - max(modified, default=0.0) >= self.request.settle_seconds

    def identify(self, name: str, request: RunRequest) -> Subject:
        """Check a subject's configuration, digest its photos, and return it."""
        config = compile_request(request, roots=self.roots)
        source = list_source(config.subject, self.store)
        if config.subject.source.startswith(STORE):
            prefix = config.subject.source.removeprefix(STORE)
            photos = [(key, self.store.compute_sha256(key)) for key in self.store.list_keys(prefix)]
        else:
            photos = [(photo, hashlib.sha256(read()).hexdigest()) for photo, read in source.files]
        return Subject(name, request, key=digest([request.model_dump(mode="json"), photos])[:32])


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
        first = names.setdefault(subject.key, subject.name) if subject.key else subject.name
        is_repeated = subject.key and first != subject.name
        yield Subject(subject.name, problem=f"the same photos and settings as {first}") if is_repeated else subject
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
        except LikenessError as error:
            yield Subject(name, problem=f"{path.name}, line {number}: {error}")


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
    for path in sorted(folder.glob(f"*/{SUBJECT_FILE}")):
        name = clean_text(path.parent.name)
        try:
            files = [file for file in path.parent.iterdir() if file.is_file()]
            described = parse_subject_file(path.read_bytes())
            present = {file.name: file.stat().st_mtime for file in files}
            if is_complete(origin, described, present):
                yield identify_described(origin, name, described, source=str(path.parent))
            else:
                yield Subject(name, is_incomplete=True)
        except LikenessError as error:
            yield Subject(name, problem=str(error))
        except OSError as error:  # a folder that is being moved
            yield Subject(name, problem=f"{path}: {error.strerror}")


def list_stored(origin: Origin, prefix: str) -> Iterator[Subject]:
    """Yield one subject per folder of the store that holds a `subject.yaml`."""
    if not prefix.endswith("/"):
        raise ConfigError(f"{STORE}{show_value(prefix)[1:-1]}: end the prefix with /, as {STORE}subjects/")
    folders: dict[str, list[StoredObject]] = {}
    for item in origin.store.list_objects(prefix):
        name, sign, rest = item.key.removeprefix(prefix).partition("/")
        if sign and rest:
            folders.setdefault(name, []).append(item)
    for name, items in sorted(folders.items()):
        start = f"{prefix}{name}/"
        present = {item.key.removeprefix(start): item.modified for item in items}
        if SUBJECT_FILE not in present:
            continue
        try:
            described = parse_subject_file(origin.store.find_bytes(start + SUBJECT_FILE) or b"")
            if is_complete(origin, described, present):
                yield identify_described(origin, clean_text(name), described, source=f"{STORE}{start}")
            else:
                yield Subject(clean_text(name), is_incomplete=True)
        except LikenessError as error:
            yield Subject(clean_text(name), problem=str(error))


def is_complete(origin: Origin, described: SubjectFile, present: dict[str, float]) -> bool:
    """Whether all files that a subject names are there, and none was written just now."""
    return set(described.photos) <= set(present) and origin.is_settled(present.values())


def identify_described(origin: Origin, name: str, described: SubjectFile, *, source: str) -> Subject:
    """Return a subject that its `subject.yaml` describes. Raises ConfigError."""
    request = make_request(
        origin.request.base, source=source, class_noun=described.class_noun, settings=described.settings
    )
    return origin.identify(name, request)
