"""The cells of a scoreboard: each is one public command, and its result is found again by content."""

import hashlib
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conf.compose import compile_request, compute_config_digest
from conf.overrides import override_request, parse_overrides
from conf.request import RunRequest
from conf.subjects import SUBJECT_FILE, SubjectFile, make_request, parse_subject_file
from flows.runs.records import list_run_folders, read_request, read_run, read_summary, to_overrides
from flows.scoreboard.plan import Plan, check_name, check_reserved
from tasks.errors import ArtifactCorrupt, ConfigError
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.run_summary import RunSummary
from tasks.manifests.subject import SubjectSet
from tasks.redaction import clean_text, redact
from tasks.services.store.open import open_store
from tasks.stage.cache import find_manifest
from tasks.stage.worker_process import child_environment, guarded
from tasks.subject.photos.decoding import SUFFIXES

NUM_PHOTOS = 5
DRAWN = re.compile(r"([a-z]+)-(\d{1,6})")


@dataclass(frozen=True)
class Subject:
    """A subject: its photos, class noun, and settings of its own."""

    name: str
    photos: Path
    file: SubjectFile


@dataclass(frozen=True)
class Cell:
    """One model of the scoreboard."""

    method: str
    subject: str
    seed: int
    request: RunRequest
    model: str = ""
    """Of another trainer; empty: a run trains it."""

    @property
    def name(self) -> str:
        """The cell's name, which is a file name too."""
        return f"{self.method}.{self.subject}.{self.seed}"

    @property
    def key(self) -> tuple[str, str, int]:
        """Method, subject and seed."""
        return self.method, self.subject, self.seed

    @property
    def words(self) -> tuple[str, ...]:
        """The command that makes and measures the model, each word quoted for a shell."""
        if not self.model:
            return ("run", *to_overrides(self.request))
        own = {"subject.identifier_token": self.request.settings.get("subject.identifier_token")}
        settings = {key: value for key, value in self.request.settings.items() if key not in own}
        rest = self.request.model_copy(update={"source": None, "class_noun": None, "settings": settings})
        token = own["subject.identifier_token"]
        named = ["--photos", str(self.request.source), "--class-noun", str(self.request.class_noun)]
        named += ["--token", str(token)] if token is not None else []
        return ("evaluate", *map(shlex.quote, [self.model, *named]), *to_overrides(rest))

    @property
    def command(self) -> str:
        """The command as a line."""
        return " ".join(["likeness", *self.words])


@dataclass(frozen=True)
class Result:
    """How a cell ended: with a run, or with the reason why not."""

    cell: Cell
    folder: Path | None = None
    """Of the run; None for a failure."""
    summary: RunSummary | None = None
    error: str = ""
    seconds: float | None = None
    """None for a result that was there before."""


def draw_subjects(names: Sequence[str], folder: Path, *, is_dry: bool = False) -> list[Subject]:
    """Draw the photos of subjects of the drawn world, unless they are there, or nothing is to be written.

    Raises ConfigError for unknown names.
    """
    from tasks.mini.world.scenes import CLASS_NOUNS, draw_subject

    subjects = []
    for name in names:
        found = DRAWN.fullmatch(name)
        if not found or found[1] not in CLASS_NOUNS:
            raise ConfigError(f"drawn: {name[:60]!r} is no class noun and number; nouns are {', '.join(CLASS_NOUNS)}")
        photos = folder / name
        if not photos.is_dir() and not is_dry:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as part:  # a killed process leaves no half of a subject
                draw_subject(found[1], seed=int(found[2]), num=NUM_PHOTOS, folder=Path(part) / name)
                (Path(part) / name).rename(photos)
        subjects.append(Subject(name, photos.absolute(), SubjectFile(class_noun=found[1])))
    return subjects


def read_subjects(folder: Path) -> list[Subject]:
    """Return the subjects of a folder of folders, each with its photos and a `subject.yaml`. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"--subjects: {folder} is not a folder")
    subjects = []
    for path in sorted(folder.glob(f"*/{SUBJECT_FILE}")):
        try:
            check_name("subject", path.parent.name)
            with path.open("rb") as file:
                found = parse_subject_file(file.read(1_000_000))
            check_reserved(found.settings)
        except (ConfigError, ValueError, OSError) as error:
            raise ConfigError(f"--subjects: {path.parent}: {error}") from error
        subjects.append(Subject(path.parent.name, path.parent.absolute(), found))
    if not subjects:
        raise ConfigError(f"--subjects: no folder in {folder} has photos and a {SUBJECT_FILE} (class_noun: mug)")
    return subjects


def list_cells(plan: Plan, subjects: Sequence[Subject], output: Path) -> Iterator[Cell]:
    """Yield the cells of a plan, subject by subject, so that photos are inspected once. Raises ConfigError."""
    nouns = [subject.file.class_noun for subject in subjects]
    for number, subject in enumerate(subjects):
        base = make_base(plan, subject, output)
        for name, method in plan.methods.items():
            request = override_request(base, method.settings)
            if method.class_noun == "wrong":
                later = [*nouns[number + 1 :], *nouns[:number]]
                wrong = [noun for noun in later if noun != subject.file.class_noun]
                if not wrong:
                    raise ConfigError(f"method {name} needs a subject of another class noun than {nouns[number]}")
                request = request.model_copy(update={"class_noun": wrong[0]})
            compile_request(request)  # wrong settings are named before anything runs
            for seed in plan.seeds:
                yield Cell(name, subject.name, seed, request.model_copy(update={"seed": seed}))


def make_base(plan: Plan, subject: Subject, output: Path) -> RunRequest:
    """Return what all cells of a subject share. Raises ConfigError."""
    shared = parse_overrides([*plan.settings, f"output_dir={output.absolute()}"])
    noun, settings = subject.file.class_noun, subject.file.settings
    return make_request(shared, source=str(subject.photos), class_noun=noun, settings=settings)


def find_result(cell: Cell, output: Path) -> Result | None:
    """Return the newest finished run of a cell; None where there is none."""
    digest = compute_config_digest(compile_request(cell.request))
    for folder in reversed(list_run_folders(output)):
        summary = read_summary(folder)
        if summary.status != "finished" or summary.config_digest != digest:
            continue
        try:
            model = read_request(folder).model
        except ArtifactCorrupt:
            continue
        if model == cell.model and has_same_content(cell, summary) and is_current(folder, cell):
            return Result(cell, folder, summary)
    return None


def is_current(folder: Path, cell: Cell) -> bool:
    """Whether a run's manifests are in the store, of the present versions of their stages, and of the same photos."""
    from tasks.evaluation.steps import STAGE_VERSION

    try:
        run = read_run(folder)
        store = open_store(run.config.store)
        subject = find_manifest(store, SubjectSet, stage="subject", key=run.find_stage_key("subject"))
        evaluation = find_manifest(store, Evaluation, stage="evaluation", key=run.find_stage_key("evaluation"))
    except (ConfigError, ArtifactCorrupt):
        return False
    if subject is None or evaluation is None or evaluation.stage_version != STAGE_VERSION:
        return False
    refused = (*subject.rejected, *subject.quarantined)
    known = {photo.source_sha256 for photo in subject.images} | {photo.source_sha256 for photo in refused}
    photos = [path for path in Path(str(cell.request.source)).iterdir() if path.suffix.lower() in SUFFIXES]
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in photos} == known


def has_same_content(cell: Cell, summary: RunSummary) -> bool:
    """Whether a model of another trainer still is what was evaluated."""
    from tasks.diffusion.external.detection import detect

    if summary.evaluated is None:
        return not cell.model
    return bool(detect(cell.model).compute_digest() == summary.evaluated.sha256)


def run_cell(cell: Cell, output: Path, *, num_threads: int | None = None) -> Result:
    """Run a cell's command; its output goes to a log file. A failure is returned, not raised."""
    log = output / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [*guarded("flows.cli.main"), *shlex.split(" ".join(cell.words))]
    environment = child_environment()  # it ends with this process, as its Prefect server does
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    started = time.monotonic()
    with log.open("wb") as file:
        file.write(f"{cell.command}\n".encode())
        file.flush()
        done = subprocess.run(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
        )  # fmt: skip
    found = find_result(cell, output) if done.returncode == 0 else None
    seconds = time.monotonic() - started
    if found is None:
        return Result(cell, error=read_error(log, done.returncode), seconds=seconds)
    return replace(found, seconds=seconds)


def read_error(log: Path, code: int) -> str:
    """Return the last line of a log."""
    lines = log.read_text(errors="replace").strip().splitlines()[1:]
    last = clean_text(redact(lines[-1])) if lines else "no output"
    return f"{last[:300]} (exit code {code}; {log})"
