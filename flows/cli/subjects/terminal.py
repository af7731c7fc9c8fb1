"""`likeness run-many` in a terminal: one line per subject as it ends, then the table and its page."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from conf.compose import describe_invalid
from conf.overrides import parse_overrides
from conf.subjects import ManyRequest
from flows.cli.run.job import ready_for_flows
from flows.cli.stack.stack import find_api_url
from flows.cli.stack.submit import make_request
from flows.subjects.records import ManyOutcome
from tasks.errors import ConfigError
from tasks.redaction import clean_text, redact

PENDING_CODE = 11  # as of `likeness pending`


def run_many_in_terminal(subjects: str, settings: list[str], options: Mapping[str, bool | int]) -> int:
    """Run all subjects and print what became of each; 1: some failed."""
    output = Path(str(parse_overrides(settings).settings.get("output_dir", "runs"))).absolute()
    try:
        # Absolute folders: a worker has another working directory.
        where = subjects if "://" in subjects or subjects.startswith("store:") else str(Path(subjects).absolute())
        # A pool elsewhere has its own output folder.
        is_remote = bool(os.environ.get("PREFECT_API_URL")) and not find_api_url(output)
        base = parse_overrides(settings) if is_remote else make_request(settings, output)
        request = ManyRequest(subjects=where, base=base, **options)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error
    if "://" not in where and not where.startswith("store:") and not Path(where).exists():
        raise ConfigError(f"{subjects}: there is no such file or folder")
    show_progress()
    with ready_for_flows(request.base, is_subject_known=False) as (_, progress, _):
        from flows.personalize_many import personalize_many
        from flows.runs.context import progress_of_run

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
