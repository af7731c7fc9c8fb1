"""The log of refused prompts: when, by which rule of the policy, and the prompt's digest in place of its text."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.runs.records import stamp
from tasks.publishing.prompt_policy import PromptRefused

VARIABLE = "LIKENESS_REFUSAL_LOG"
FILE = "refused-prompts.jsonl"


@contextmanager
def log_refusals(output: Path, *, model: str) -> Iterator[None]:
    """Append a row for each prompt that is refused within the block; the error continues, whether it was logged or not.

    The file lies in the output folder, or is what LIKENESS_REFUSAL_LOG names; `off` writes none.
    """
    try:
        yield
    except PromptRefused as error:
        named = os.environ.get(VARIABLE, "")
        path = Path(named).expanduser() if named else output / FILE
        row = {"time": stamp(time.time()), "rule": error.rule, "prompt_sha256": error.prompt_sha256, "model": model}
        if named != "off":
            append(path, row)
        raise


def append(path: Path, row: dict[str, str]) -> None:
    """Append a row in one write, so that rows of processes at the same time stay whole; a failure is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(f"{json.dumps(row)}\n".encode())
    except OSError as error:
        print(f"warning: the refusal was not logged in {path}: {error.strerror}; set {VARIABLE}", file=sys.stderr)
