"""Batch jobs on this machine: the same JSONL through a program (vllm run-batch), or through chat completions."""

import math
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt, ConfigError, ServiceUnavailable
from tasks.services.llm.batch.provider import BatchReply, Call, RemoteJob, parse_row, read_lines
from tasks.services.llm.budget.journal import append_line
from tasks.services.llm.chat.completion import ChatCompletion
from tasks.services.llm.chat.retries import map_in_pool
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.errors import RequestRefused
from tasks.stage.digests import digest_file, dump_line, dump_signed, load_lines, load_signed, parse_json
from tasks.stage.files import write_atomic

ROW_STATUSES = (400, 413, 422)  # what says that a row is wrong, not the profile


class OutputNote(BaseModel):
    """The digest of a program's output, written after it."""

    sha256: str


class FileBatches:
    """A program on this machine that reads one file and writes another."""

    def __init__(self, profile: ProfileConfig, folder: Path) -> None:
        self.command = profile.batch_command
        self.model = profile.model
        self.folder = folder

    def find(self, idempotency_key: str) -> RemoteJob | None:
        """Return the job whose output is there, whole."""
        job_id = name_of(idempotency_key)
        return None if self.is_lost(job_id) else self.retrieve(job_id)

    def is_lost(self, job_id: str) -> bool:
        """Whether its output is gone, or is not what the program wrote."""
        output = self.output(job_id)
        try:
            note = load_signed(OutputNote, self.note(job_id).read_bytes())
            return digest_file(output) != note.sha256
        except (FileNotFoundError, ArtifactCorrupt):
            return True

    def upload(self, lines: dict[str, bytes], idempotency_key: str) -> str:
        """Write the input file."""
        path = self.folder / f"{name_of(idempotency_key)}.in.jsonl"
        write_atomic(path, b"".join(lines.values()))
        return str(path)

    def create(self, file_id: str, idempotency_key: str, *, call: Call) -> RemoteJob:
        """Run the program to its end. Raises ServiceUnavailable where it fails."""
        self.check_input(file_id)
        output = self.output(name_of(idempotency_key))
        staged = output.with_suffix(".part")
        words = {"input": file_id, "output": str(staged), "model": self.model}
        command = [word.format(**words) for word in self.command]
        log = output.with_suffix(".log")
        try:
            with log.open("wb") as file:
                done = subprocess.run(command, stdout=file, stderr=file, check=False)
        except OSError as error:
            raise ConfigError(f"{command[0]} can't be started: {error.strerror}; see .batch_command") from error
        if done.returncode != 0 or not staged.is_file():
            raise ServiceUnavailable(f"{command[0]} ended with {done.returncode}; see {log}, and run again")
        return self.finish(staged, name_of(idempotency_key))

    def check_input(self, file_id: str) -> None:
        """Raise RequestRefused where the input file is gone, as a provider would."""
        if not Path(file_id).is_file():
            raise RequestRefused(f"the input file {file_id} is gone; run again to write it anew", status=404)

    def finish(self, staged: Path, job_id: str) -> RemoteJob:
        """Put the output and its digest in place."""
        note = OutputNote(sha256=digest_file(staged))
        os.replace(staged, self.output(job_id))
        write_atomic(self.note(job_id), dump_signed(note))
        return self.retrieve(job_id)

    def add_requests(self, job: RemoteJob, lines: dict[str, bytes]) -> None:
        """Do nothing: the file had all rows."""

    def retrieve(self, job_id: str) -> RemoteJob:
        """Return the job: it has ended, or it wouldn't be there."""
        return RemoteJob(job_id, "completed", output_files=(str(self.output(job_id)),))

    def cancel(self, job_id: str) -> None:
        """Do nothing: it runs here, to its end."""

    def read(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Read the output file, successes and errors in one."""
        for path in job.output_files:
            yield from read_lines(Path(path).read_bytes())

    def output(self, job_id: str) -> Path:
        """Return where the program's result goes."""
        return self.folder / f"{job_id}.out.jsonl"

    def note(self, job_id: str) -> Path:
        """Return where the digest of its result goes."""
        return self.folder / f"{job_id}.out.digest.json"


class LocalBatches(FileBatches):
    """Rows through chat completions, several at once, each written down as it comes: any server can be batched."""

    def __init__(self, profile: ProfileConfig, folder: Path, ask: Callable[[dict[str, Any]], ChatCompletion]) -> None:
        super().__init__(profile, folder)
        self.ask = ask
        self.concurrency = profile.concurrency
        self.writing = threading.Lock()

    def create(self, file_id: str, idempotency_key: str, *, call: Call) -> RemoteJob:
        """Ask what an earlier attempt did not; a row that can't be answered is one that failed."""
        self.check_input(file_id)
        staged = self.output(name_of(idempotency_key)).with_suffix(".part")
        staged.touch()
        done = {custom_id for custom_id, _ in read_signed_lines(staged.read_bytes())}
        rows = [row for line in Path(file_id).read_bytes().split(b"\n") if line and (row := read_input(line, file_id))]
        left = [row for row in rows if row["custom_id"] not in done]
        list(map_in_pool(lambda row: self.answer(row, staged), left, concurrency=self.concurrency))
        return self.finish(staged, name_of(idempotency_key))

    def answer(self, row: dict[str, Any], staged: Path) -> None:
        """Answer one row and append it. Raises what no other row would fare better with.

        A row that ends the job is noted too: with the next run it must not end it again.
        """
        outcome: dict[str, Any] = {"custom_id": row["custom_id"], "response": None, "error": None}
        try:
            response = {"status_code": 200, "body": drop_infinite(self.ask(row["body"]).raw)}
            dump_line(response)
            outcome["response"] = response
        except RecursionError:  # this row fails alone
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

    def read(self, job: RemoteJob) -> Iterator[tuple[str, BatchReply]]:
        """Read the output file; a line that was changed is none."""
        for path in job.output_files:
            yield from read_signed_lines(Path(path).read_bytes())


def read_input(line: bytes, path: str) -> dict[str, Any]:
    """Return one row to be asked. Raises RequestRefused where the input file is damaged."""
    try:
        row = parse_json(line)
    except ArtifactCorrupt as error:
        raise RequestRefused(f"the input file {path} is damaged; run again to write it anew", status=404) from error
    if not isinstance(row, dict) or not isinstance(row.get("body"), dict) or "custom_id" not in row:
        raise RequestRefused(f"the input file {path} is damaged; run again to write it anew", status=404)
    return row


def drop_infinite(value: Any) -> Any:
    """Return a JSON value without NaN and infinity, which are no JSON."""
    if isinstance(value, dict):
        return {key: drop_infinite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [drop_infinite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_signed_lines(data: bytes) -> Iterator[tuple[str, BatchReply]]:
    """Yield custom ids and outcomes of lines that are what was written."""
    for row in load_lines(data):
        if row is not None:
            yield parse_row(row)


def name_of(idempotency_key: str) -> str:
    """Return a idempotency_key as a file name."""
    return idempotency_key.replace("/", "-")
