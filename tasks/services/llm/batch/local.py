"""Batch jobs on this machine: the same JSONL through a program (vllm run-batch) or through chat completions."""

import json
import math
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt, ConfigError, ServiceUnavailable
from tasks.services.llm.batch.provider import LOST, BatchReply, RemoteJob, Submission, parse_row, read_lines
from tasks.services.llm.budget.journal import append_line
from tasks.services.llm.chat.body import ChatBody
from tasks.services.llm.chat.completion import ChatCompletion
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.errors import RequestRefused
from tasks.services.llm.retries import map_in_pool
from tasks.stage.digests import digest_file, dump_line, dump_signed, load_lines, load_signed
from tasks.stage.files import write_atomic

ROW_STATUSES = (400, 413, 422)  # the row is at fault, not key, model or address
MAX_DEPTH = 100  # a limit of our own: the interpreter's differs, libraries such as torch raise it


class OutputNote(BaseModel):
    """The digest of a program's output, written after it."""

    sha256: str


class FileBatches:
    """A program on this machine that reads one file and writes another."""

    def __init__(self, profile: ProfileConfig, folder: Path) -> None:
        self.command = profile.batch_command
        self.model = profile.model
        self.folder = folder

    def submit(self, lines: Mapping[str, bytes], submission: Submission) -> RemoteJob:
        """Run the job to its end, unless its complete output exists."""
        found = self.find(submission.key)
        if found is not None:
            return found
        job_id = name_job(submission.key)
        submission.reserve()
        output = self.output(job_id)
        output.parent.mkdir(parents=True, exist_ok=True)
        staged = output.with_suffix(".part")
        self.run(lines, staged)
        # The note comes first: a crash before the rename leaves the staged rows, from which the next run resumes.
        # A note without its output counts as lost, and an output that differs from its note too.
        write_atomic(self.note(job_id), dump_signed(OutputNote(sha256=digest_file(staged))))
        os.replace(staged, output)
        return self.poll(job_id)

    def find(self, key: str) -> RemoteJob | None:
        """Return the job if its complete output exists."""
        job = self.poll(name_job(key))
        return None if job.status == LOST else job

    def run(self, lines: Mapping[str, bytes], staged: Path) -> None:
        """Run the program. Raises ServiceUnavailable where it fails, ConfigError where it can't be started."""
        source = staged.with_suffix(".in.jsonl")
        write_atomic(source, b"".join(lines.values()))
        words = {"input": str(source), "output": str(staged), "model": self.model}
        # `batch_command` is trusted: it is part of a profile, which only the operator sets.
        command = [word.format(**words) for word in self.command]
        log = staged.with_suffix(".log")
        try:
            with log.open("wb") as file:
                done = subprocess.run(command, stdout=file, stderr=file, check=False)
        except OSError as error:
            raise ConfigError(f"{command[0]} can't be started: {error.strerror}; see .batch_command") from error
        if done.returncode != 0 or not staged.is_file():
            raise ServiceUnavailable(f"{command[0]} ended with {done.returncode}; see {log}, and run again")

    def poll(self, job_id: str) -> RemoteJob:
        """Return the job as completed, or as LOST where its output is missing or damaged; it never is in progress."""
        output = self.output(job_id)
        try:
            note = load_signed(OutputNote, self.note(job_id).read_bytes())
            is_whole = digest_file(output) == note.sha256
        except (FileNotFoundError, ArtifactCorrupt):
            is_whole = False
        return RemoteJob(job_id, "completed" if is_whole else LOST, output_files=(str(output),))

    def cancel(self, job_id: str) -> None:
        """Do nothing: `submit` runs the job to its end."""

    def results(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Read the output file, successes and errors in one."""
        for path in job.output_files:
            yield from read_lines(Path(path).read_bytes())

    def output(self, job_id: str) -> Path:
        """Return the path of a job's output."""
        return self.folder / f"{job_id}.out.jsonl"

    def note(self, job_id: str) -> Path:
        """Return the path of the output's digest."""
        return self.folder / f"{job_id}.out.digest.json"


def name_job(key: str) -> str:
    """Return the id of the job with this idempotency key, which is a file name."""
    return key.replace("/", "-")


class LocalBatches(FileBatches):
    """Sends rows as concurrent chat completions and appends each outcome at once, so any server can run a batch."""

    def __init__(self, profile: ProfileConfig, folder: Path, ask: Callable[[ChatBody], ChatCompletion]) -> None:
        super().__init__(profile, folder)
        self.ask = ask
        self.concurrency = profile.concurrency
        self.writing = threading.Lock()

    def run(self, lines: Mapping[str, bytes], staged: Path) -> None:
        """Send the rows that an earlier attempt did not; a failed row is recorded with its error."""
        staged.touch()
        # Signed lines: a line torn by a crash fails verification, and its row is sent again.
        done = {custom_id for custom_id, _ in read_signed_lines(staged.read_bytes())}
        left = [json.loads(line) for custom_id, line in lines.items() if custom_id not in done]
        # `map_in_pool` is a generator: it runs while it is consumed.
        list(map_in_pool(lambda row: self.answer(row, staged), left, concurrency=self.concurrency))

    def answer(self, row: dict[str, Any], staged: Path) -> None:
        """Answer one row and append the outcome; an error that is not this row's alone is raised too.

        A row whose error ends the job is recorded as well, so that it can't end the next run again.
        """
        outcome: dict[str, object] = {"custom_id": row["custom_id"], "response": None, "error": None}
        try:
            outcome["response"] = {"status_code": 200, "body": drop_infinite(self.ask(row["body"]).raw)}
        except NestingError:
            outcome["error"] = {"message": "the reply nests too deeply"}
        except (ServiceUnavailable, RequestRefused) as error:
            if isinstance(error, RequestRefused) and error.status not in ROW_STATUSES:
                raise
            outcome["error"] = {"message": str(error)}
            raise
        finally:
            if outcome["response"] or outcome["error"]:
                with self.writing:
                    append_line(staged, dump_line(outcome).encode())

    def results(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Yield the rows of the output file whose lines verify."""
        for path in job.output_files:
            yield from read_signed_lines(Path(path).read_bytes())


class NestingError(ValueError):
    """A JSON value nests deeper than MAX_DEPTH."""


def drop_infinite(value: object, *, max_depth: int = MAX_DEPTH) -> object:
    """Return a JSON value with NaN and infinity replaced by null: a signed line can't hold them.

    Raises:
        NestingError: the value nests deeper than `max_depth`.

    """
    if max_depth < 0:
        raise NestingError
    if isinstance(value, dict):
        return {key: drop_infinite(child, max_depth=max_depth - 1) for key, child in value.items()}
    if isinstance(value, list):
        return [drop_infinite(child, max_depth=max_depth - 1) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_signed_lines(data: bytes) -> Iterator[tuple[str, BatchReply]]:
    """Yield custom ids and outcomes of the lines that verify."""
    for row in load_lines(data):
        if row is not None:
            yield parse_row(row)
