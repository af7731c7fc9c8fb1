"""`likeness run-many` in a terminal: one line per subject as it ends, then the table and its page."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from conf.compose import STORE_VARIABLE, compile_request, describe_invalid, split_store_url
from conf.overrides import parse_overrides
from conf.request import RunRequest, Value
from conf.subjects import ManyRequest
from flows.cli.run.job import ready_for_flows
from flows.cli.stack.stack import find_api_url
from flows.cli.stack.submit import make_request
from flows.subjects.records import ManyOutcome
from tasks.errors import ConfigError
from tasks.redaction import clean_text, redact, show_value

PENDING_CODE = 11  # as of `likeness pending`
CHOICES = {"store.kind", "store.bucket", "store.prefix", "store.folder"}
"""Settings that say where objects lie."""


def run_many_in_terminal(subjects: str, settings: list[str], options: Mapping[str, bool | int]) -> int:
    """Run all subjects and print what became of each; 1: some failed."""
    output = Path(str(parse_overrides(settings).settings.get("output_dir", "runs"))).absolute()
    try:
        # A pool elsewhere has its own output folder.
        is_remote = bool(os.environ.get("PREFECT_API_URL")) and not find_api_url(output)
        typed = parse_overrides(settings) if is_remote else make_request(settings, output)
        where, base = find_folder(subjects, typed) if subjects.startswith("s3://") else (subjects, typed)
        # Absolute folders: a worker has another working directory.
        where = where if "://" in where or where.startswith("store:") else str(Path(where).absolute())
        request = ManyRequest(subjects=where, base=base, **options)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error
    if "://" not in where and not where.startswith("store:") and not Path(where).exists():
        raise ConfigError(f"{subjects}: there is no such file or folder")
    show_progress()
    with ready_for_flows(request.base, is_subject_known=False) as (_, progress, _):
        from flows.personalize_many import personalize_many
        from flows.runs.context import progress_of_run
        from flows.subjects.dispatch import has_pool

        if base is not typed and has_pool():  # its worker would refuse each run
            raise ConfigError(
                f"{show_value(subjects)}: runs on a work pool use the bucket of its worker, which no request chooses; "
                f"name a folder there as store:PREFIX/, and set {STORE_VARIABLE} here as for the worker"
            )
        token = progress_of_run.set(progress)
        try:
            outcome = personalize_many(request)
        except KeyboardInterrupt:
            print("\nstopped; submitted runs go on, and the same command resumes", file=sys.stderr)
            raise
        finally:
            progress_of_run.reset(token)
            progress.close()
    return print_outcome(outcome)


def find_folder(url: str, base: RunRequest) -> tuple[str, RunRequest]:
    """Return s3://BUCKET/PREFIX/FOLDER/ as a folder of the store, and the request with a store that holds it.

    Photos and results have one store: the one that was chosen, else s3://BUCKET/PREFIX.

    Raises:
        ConfigError: the address names no folder, or one outside the chosen store.

    """
    bucket = split_store_url(url, name="run-many")["store.bucket"]
    path = url.removeprefix(f"s3://{bucket}").removeprefix("/").removesuffix("/")
    if path and not {"", ".", ".."}.isdisjoint(path.split("/")):  # S3 takes them literally, stores don't
        raise ConfigError(f"{show_value(url)}: a part of the address is empty, . or ..; name the folder without it")
    prefix, _, folder = path.rpartition("/")
    chosen, request = base.settings.keys() & CHOICES, base
    if os.environ.get(STORE_VARIABLE) or chosen or base.store not in (None, "auto", "s3"):
        store = compile_request(base).store
        prefix, start = store.prefix.strip("/"), f"{store.prefix.strip('/')}/".lstrip("/")
        if store.kind != "s3" or store.bucket != bucket or not f"{path}/".startswith(start):
            own = f"s3://{store.bucket}/{prefix}" if store.kind == "s3" else "a local store"
            raise ConfigError(
                f"{show_value(url)} lies outside of {own}, where results go: name a folder there as store:PREFIX/, or "
                f"leave out settings of the store and {STORE_VARIABLE}"
            )
        folder = f"{path}/".removeprefix(start).rstrip("/")
    else:
        own_store: dict[str, Value] = {"store.kind": "s3", "store.bucket": bucket, "store.prefix": prefix}
        request = base.model_copy(update={"settings": {**base.settings, **own_store}})
    if not folder:
        raise ConfigError(f"{show_value(url)}: name a folder of subjects in it, as {url.rstrip('/')}/subjects/")
    return f"store:{folder}/", request


def show_progress() -> None:
    """Print what the flow logs about subjects."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(CleanFormatter("%(message)s"))
    log = logging.getLogger("likeness.subjects")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class CleanFormatter(logging.Formatter):
    """Formats lines without secrets and control characters: names and errors come from elsewhere."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one clean line."""
        return clean_text(redact(super().format(record)))


def print_outcome(outcome: ManyOutcome) -> int:
    """Print the number of subjects by status, the failed ones, and where the page is; return the exit code."""
    statuses = [each.status for each in outcome.outcomes]
    counted = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    print(f"\n{len(statuses)} subjects{f': {counted}' if counted else ''}")
    for each in outcome.outcomes:
        if each.status in ("failed", "refused"):
            print(clean_text(redact(f"{each.status}: {each.name}: {each.reason}")), file=sys.stderr)
    print(f"page      {Path(outcome.folder) / 'index.html'}")
    print(f"table     {Path(outcome.folder) / 'table.csv'}")
    if outcome.count("failed", "refused", "cancelled"):
        return 1
    return PENDING_CODE if outcome.count("pending") else 0
