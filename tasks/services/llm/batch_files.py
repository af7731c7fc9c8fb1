"""Batch jobs on this machine: the same JSONL through a program (vllm run-batch), or through chat completions."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.llm.batch_protocol import BatchReply, Call, RemoteJob, read_lines
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.pacing import Pace
from tasks.services.llm.requests import count_body_tokens
from tasks.services.llm.transport import complete


class FileBatches:
    """A program on this machine that reads one file and writes another."""

    def __init__(self, profile: ProfileConfig, folder: Path) -> None:
        self.command = profile.batch_command
        self.model = profile.model
        self.folder = folder

    def find(self, mark: str) -> RemoteJob | None:
        """Return the job whose output is there, whole."""
        job_id = name_of(mark)
        return self.look(job_id) if self.output(job_id).is_file() else None

    def is_lost(self, job_id: str) -> bool:
        """Whether its files are gone."""
        return not self.output(job_id).is_file()

    def upload(self, lines: dict[str, bytes], mark: str) -> str:
        """Write the input file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name_of(mark)}.in.jsonl"
        path.write_bytes(b"".join(lines.values()))
        return str(path)

    def create(self, file_id: str, mark: str, *, call: Call) -> RemoteJob:
        """Run the program to its end. Raises ServiceUnavailable where it fails."""
        output = self.output(name_of(mark))
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
        os.replace(staged, output)
        return self.look(name_of(mark))

    def fill(self, job: RemoteJob, lines: dict[str, bytes]) -> None:
        """Do nothing: the file had all rows."""

    def look(self, job_id: str) -> RemoteJob:
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


class LocalBatches(FileBatches):
    """Rows through chat completions, several at once, each written down as it comes: any server can be batched."""

    def __init__(self, profile: ProfileConfig, folder: Path, call: Call, pace: Pace) -> None:
        super().__init__(profile, folder)
        self.profile = profile
        self.call = call
        self.pace = pace
        self.concurrency = profile.concurrency
        self.writing = threading.Lock()

    def create(self, file_id: str, mark: str, *, call: Call) -> RemoteJob:
        """Ask what an earlier attempt did not; a row that can't be answered is one that failed."""
        output = self.output(name_of(mark))
        staged = output.with_suffix(".part")
        done = {custom_id for custom_id, _ in read_lines(staged.read_bytes())} if staged.exists() else set()
        rows = [json.loads(line) for line in Path(file_id).read_bytes().split(b"\n") if line]
        with ThreadPoolExecutor(self.concurrency) as pool:
            list(pool.map(lambda row: self.answer(row, staged), [row for row in rows if row["custom_id"] not in done]))
        os.replace(staged, output)
        return self.look(name_of(mark))

    def answer(self, row: dict[str, Any], staged: Path) -> None:
        """Answer one row and append it. Raises what no other row would fare better with."""
        outcome: dict[str, Any] = {"custom_id": row["custom_id"], "response": None, "error": None}
        try:
            self.pace.wait(count_body_tokens(row["body"], self.profile)[0])
            body = self.call(lambda client, timeout: complete(client, row["body"], timeout_seconds=timeout))
            outcome["response"] = {"status_code": 200, "body": body}
        except ServiceUnavailable as error:
            outcome["error"] = {"message": str(error)}
        with self.writing, staged.open("ab") as file:
            file.write(json.dumps(outcome).encode() + b"\n")


def name_of(mark: str) -> str:
    """Return a mark as a file name."""
    return mark.replace("/", "-")
