"""Records in a run's folder: `summary.json`, written from the start of the run, and `request.json`.

Both carry their own digest. A torn or modified record affects its own run only and never fails a command.
"""

import errno
import json
import os
import shlex
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from conf.defaults import fill_defaults
from conf.groups import GROUPS
from conf.request import RunRequest
from conf.schema import RunConfig
from tasks.errors import ApprovalPending, ArtifactCorrupt, ConfigError, LikenessError, StillPending, TrainingStopped
from tasks.manifests.run_summary import (
    ProcessOwner,
    RunError,
    RunPaths,
    RunSummary,
    StageSummary,
    Status,
    make_head,
)
from tasks.redaction import clean_text, redact
from tasks.services.store.lease import find_start, is_same_process, read_boot
from tasks.stage.digests import digest, dump_signed, load_signed, parse_json, sign, verify_signed
from tasks.stage.files import write_atomic

if TYPE_CHECKING:
    from tasks.manifests.base import ObjectRef
    from tasks.publishing.report.usage import ModelPlace, Snippet

SUMMARY, REQUEST, MODEL_LINK = "summary.json", "request.json", "model"
PAUSE = "Pause"
"""Name of the exception by which Prefect suspends a flow run."""


class StoredRequest(BaseModel):
    """The request of a run, and whether it may set operator-only fields."""

    request: RunRequest
    is_trusted: bool
    model: str = ""
    """The model from elsewhere that is evaluated; empty: the run trains its own."""


def write_request(folder: Path, request: RunRequest, *, is_trusted: bool, model: str = "") -> None:
    """Write `request.json` to the run's folder."""
    stored = StoredRequest(request=request, is_trusted=is_trusted, model=model)
    write_atomic(folder / REQUEST, dump_signed(stored, indent=1))


def read_request(folder: Path) -> StoredRequest:
    """Return a run's request. Raises ArtifactCorrupt for a damaged or missing file."""
    return read_request_file(folder / REQUEST, hint="start the run again by hand")


def read_request_file(path: Path, *, hint: str) -> StoredRequest:
    """Return the request in a `request.json`. Raises ArtifactCorrupt, with a hint of what to do."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactCorrupt(f"{path} can't be read: {error.strerror}") from error
    try:
        return load_signed(StoredRequest, data)
    except ArtifactCorrupt as error:
        raise ArtifactCorrupt(f"{path}: {error}; {hint}") from error


def write_summary(folder: Path, summary: RunSummary) -> None:
    """Replace a run's summary."""
    # Unset fields are left out: an unfinished run's file names what is known and nothing else.
    plain = summary.model_dump(mode="json", exclude_unset=True)
    write_atomic(folder / SUMMARY, json.dumps(sign(plain), indent=1) + "\n")


def write_start(folder: Path, run_id: str, config_digest: str = "", *, flow_run_id: str = "") -> None:
    """Mark a run as running, and record its process."""
    summary = make_head(run_id, "running").model_copy(
        update={
            "config_digest": config_digest,
            "started_at": stamp(time.time()),
            "flow_run_id": flow_run_id,
            "owner": own_process(),
        }
    )
    write_summary(folder, summary)


def close_earlier(folder: Path, flow_run_id: str) -> None:
    """Mark suspended attempts of the same flow run as resumed by this one: nobody has to decide or wait for them."""
    for earlier in list_run_folders(folder.parent) if flow_run_id else ():
        summary = read_summary(earlier) if earlier != folder else None
        if summary is not None and summary.flow_run_id == flow_run_id and summary.status == "pending":
            write_summary(earlier, summary.model_copy(update={"status": "resumed", "resumed_by": folder.name}))


def write_stages(folder: Path, keys: dict[str, str]) -> None:
    """Record the keys of the stages that a run has begun, so that `likeness gc` keeps their objects."""
    summary = read_summary(folder)
    # A stage in another thread may begin after the run has ended.
    if summary.status == "running":
        stages = {name: StageSummary(key=key) for name, key in keys.items()}
        write_summary(folder, summary.model_copy(update={"stages": stages}))


def write_end(folder: Path, run_id: str, error: BaseException) -> None:
    """Record what ended a run before it was finished."""
    earlier = read_summary(folder)
    # An error after the end, such as a tracking server that can't be closed, does not undo the result.
    if earlier.status == "finished":
        return
    if type(error).__name__ == PAUSE:
        error = ApprovalPending("the photos wait for approval in Prefect's UI, or by `likeness approve`")
    lines = clean_text(redact(str(error))).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    kind = error.kind if isinstance(error, LikenessError) else type(error).__name__
    kept: dict[str, object] = {
        name: getattr(earlier, name)
        for name in ("config_digest", "started_at", "flow_run_id", "stages")
        if name in earlier.model_fields_set
    }
    details = {"error": RunError(kind=kind, message=reason[:500])}
    write_summary(folder, make_head(run_id, find_status(error)).model_copy(update={**kept, **details}))


def find_status(error: BaseException) -> Status:
    """Return the status of a run that ended with an error; an interruption by the user is not a failure."""
    if isinstance(error, StillPending):
        return "pending"
    is_stopped = isinstance(error, KeyboardInterrupt | SystemExit | TrainingStopped)
    # Prefect's own are matched by name: commands that list runs don't wait for its import.
    is_stopped = is_stopped or type(error).__name__ in ("TerminationSignal", "CancelledRun", "CancelledError")
    return "cancelled" if is_stopped else "failed"


def stamp(seconds: float) -> str:
    """Return a time as UTC text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def read_summary(folder: Path) -> RunSummary:
    """Return a run's summary; where it is missing, torn or changed, a status that says so.

    A run that is marked as running and whose process is gone was killed.
    """
    try:
        summary = RunSummary.model_validate(verify_signed(parse_json(read_plain(folder / SUMMARY))))
    except FileNotFoundError:  # killed between `write_request` and `write_start`
        return make_head(folder.name, "killed")
    except (ArtifactCorrupt, OSError) as error:
        details = RunError(kind=type(error).__name__, message=str(error))
        return make_head(folder.name, "damaged").model_copy(update={"error": details})
    except ValidationError:
        return make_head(folder.name, "damaged")
    if summary.status == "running" and not is_alive(summary.owner):
        return summary.model_copy(update={"status": "killed"})
    return summary


def read_plain(path: Path) -> bytes:
    """Return a file's content. Raises OSError for anything but a regular file: opening a FIFO would block."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file")
    return path.read_bytes()


def own_process() -> ProcessOwner:
    """Return what runs and trials of this process are marked with."""
    pid = os.getpid()
    return ProcessOwner(host=socket.gethostname(), pid=pid, started=round(find_start(pid), 2), boot=read_boot())


def is_alive(owner: ProcessOwner | None) -> bool:
    """Whether a run's process is alive; one on another host is assumed to be."""
    if owner is None:
        return False
    # A shared output folder: nothing can be said of another machine's processes, so its runs are not resumed.
    if owner.host != socket.gethostname():
        return True
    return is_same_process(owner.pid, owner.started, owner.boot)


def list_run_folders(output: Path) -> list[Path]:
    """Return the folders of all runs, in any status, oldest first."""
    return sorted(path.parent for path in output.glob(f"*/{REQUEST}"))


def list_summaries(output: Path) -> list[RunSummary]:
    """Return the summaries of all runs in a folder, newest first, with paths as they are from here."""
    return [resolve_paths(read_summary(folder), folder) for folder in reversed(list_run_folders(output))]


def link_model(folder: Path, model: str) -> None:
    """Make `model` in a run's folder a link to the published model, relative, so that both may move together."""
    link = folder / MODEL_LINK
    # A model in a bucket has no link, and file systems without links have none either.
    if "://" not in model and not link.is_symlink():
        with suppress(OSError):
            link.symlink_to(model, target_is_directory=True)


def place_model(folder: Path, model: str) -> "ModelPlace":
    """Return where a reader of a run's report finds its model: the link, or a copy of what lies in a bucket."""
    from tasks.publishing.report.usage import ModelPlace

    run, output = folder.name, str(folder.parent.absolute())
    if "://" in model:
        copy = f"likeness publish {shlex.quote(run)} --to {shlex.quote(run)} --output-dir {shlex.quote(output)}"
        return ModelPlace(f"{run}/model", copy, run, output, has_checkout=True)
    link = folder.absolute() / MODEL_LINK
    path = str(link) if link.is_dir() else os.path.normpath(folder.absolute() / model)
    return ModelPlace(path, run=run, output=output, has_checkout=True)


def write_report(folder: Path, page: str, refs: Sequence["ObjectRef"], *, snippets: Sequence["Snippet"] = ()) -> None:
    """Write a report into a run's folder, with snippets, and links to the model's files where the model is linked."""
    from tasks.publishing.report.placement import NearbyModel, list_names, place_report

    link = MODEL_LINK if (folder / MODEL_LINK).is_dir() else ""
    write_atomic(folder / "report.html", place_report(page, NearbyModel(snippets, link, list_names(refs))))


def resolve_paths(summary: RunSummary, folder: Path) -> RunSummary:
    """Return a summary whose paths are absolute; they are kept relative to the run's folder, which may move."""
    if summary.paths is None:
        return summary

    def resolve(path: str) -> str:
        return path if "://" in path else os.path.normpath(folder.absolute() / path)

    paths = RunPaths(
        report=resolve(summary.paths.report),
        model=resolve(summary.paths.model),
        manifests={stage: resolve(path) for stage, path in summary.paths.manifests.items()},
    )
    return summary.model_copy(update={"paths": paths})


def relate(path: str, folder: Path) -> str:
    """Return a path relative to a run's folder; an address in a bucket stays as it is."""
    # Resolved: `..` after a link leads elsewhere.
    return path if "://" in path else os.path.relpath(Path(path).resolve(), folder.resolve())


def suggest_next(summary: RunSummary, folder: Path) -> str:
    """Return the command that resumes an unfinished run, or an empty string."""
    status = summary.status
    if status == "pending":
        is_asked = summary.error is not None and summary.error.kind == ApprovalPending.__name__
        return f"likeness approve {summary.run_id}" if is_asked else "likeness pending"
    if status in ("finished", "resumed", "running"):
        return ""
    try:
        stored = read_request(folder)
        if stored.model:
            return f"likeness resume {summary.run_id}"
        return " ".join(["likeness run", *to_overrides(relocate(stored.request, folder))])
    except ArtifactCorrupt:
        return "its request is damaged: start it again by hand"


def to_overrides(request: RunRequest) -> list[str]:
    """Return the command-line arguments equivalent to a request."""
    default, words = RunRequest(), []
    for field, group in GROUPS.items():
        value = getattr(request, field)
        # `subject.source` below implies the option `folder`.
        if value != getattr(default, field) and (field != "subject" or request.source is None):
            words.append(f"{group}={value}")
    settings = {**request.settings}
    for name in ("source", "class_noun"):
        if getattr(request, name) is not None:
            settings[f"subject.{name}"] = getattr(request, name)
    if request.seed is not None:
        settings["seed"] = request.seed
    words += [f"{name}={write_value(value)}" for name, value in settings.items()]
    return [shlex.quote(word) for word in words]


def write_value(value: object) -> str:
    """Return a value as Hydra's command line reads it back."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(write_item(item) for item in value)}]"
    if isinstance(value, str) and any(char in value for char in ",'\"[]{}"):
        return write_item(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_item(value: object) -> str:
    """Return one item of a list; texts are quoted."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return write_value(value)


@dataclass(frozen=True)
class PastRun:
    """A run that has ended: its configuration, with paths as they are from here, and its summary."""

    config: RunConfig
    summary: RunSummary

    def find_stage_key(self, stage: str) -> str:
        """Return the key of a stage's manifest. Raises ConfigError where the run did not finish."""
        if self.summary.status != "finished":
            raise ConfigError(f"run {self.summary.run_id} did not finish ({self.summary.status})")
        if stage not in self.summary.stages:
            raise ConfigError(f"run {self.summary.run_id} evaluated a model from elsewhere: it has no {stage} stage")
        return self.summary.stages[stage].key


def read_run_config(data: bytes) -> tuple[RunConfig, object]:
    """Return a stored configuration and its own values, which may lack settings that a later version added."""
    stored = parse_json(data)
    return RunConfig.model_validate_json(json.dumps(fill_defaults(stored))), stored


def read_run(folder: Path) -> PastRun:
    """Return what a run's folder holds. Raises ConfigError for a run of another version, or a damaged one."""
    try:
        data = (folder / "config.json").read_bytes()
        config, stored = read_run_config(data)
        found = digest(stored)[:16]  # of the text: a later version may add settings
    except (ValidationError, OSError, ArtifactCorrupt) as error:
        raise ConfigError(f"run {folder.name} is of another version of likeness, or damaged; run it again") from error
    summary = read_summary(folder)
    if summary.config_digest not in ("", found):
        raise ConfigError(f"{folder / 'config.json'} was changed after the run; run it again")
    # The stored paths are those of the original location; the run's folder may have moved.
    store = config.store.model_copy(update={"folder": rebase(config.store.folder, config.output_dir, folder)})
    config = config.model_copy(update={"store": store, "output_dir": str(folder.parent)})
    return PastRun(config, summary)


def rebase(path: str, old_output: str, folder: Path) -> str:
    """Return a path that lay in a run's output folder as it is where the run's folder is now."""
    old = Path(old_output).absolute()
    if not path or not Path(path).absolute().is_relative_to(old):
        return path
    return str(folder.parent / Path(path).absolute().relative_to(old))


def relocate(request: RunRequest, folder: Path) -> RunRequest:
    """Return a run's request with paths adjusted to the current folder of the run, which may be a copy."""
    try:
        old = read_run_config((folder / "config.json").read_bytes())[0].output_dir
    except (ValidationError, OSError, ArtifactCorrupt):
        # Without a readable config.json: what the request says, or the default.
        old = str(request.settings.get("output_dir", "runs"))
    if Path(old).resolve() == folder.parent.resolve():
        return request
    settings = {**request.settings, "output_dir": str(folder.parent)}
    if "store.folder" in settings:
        settings["store.folder"] = rebase(str(settings["store.folder"]), old, folder)
    return request.model_copy(update={"settings": settings})
