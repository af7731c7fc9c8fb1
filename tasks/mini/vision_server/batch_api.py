"""Files and batch jobs of the mini vision server, in memory: both are lost when it ends."""

import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

ENDPOINT = "/v1/chat/completions"
MAX_BYTES = 200_000_000


class BatchApiError(Exception):
    """A request that can't be served."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class InMemoryBatchApi:
    """The subset of OpenAI's Files and Batch APIs that the batch client uses."""

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.answer = answer
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.turn = threading.Lock()

    def add_file(self, name: str, data: bytes, *, purpose: str) -> dict[str, Any]:
        """Store a file. Raises BatchApiError where it is too large."""
        if len(data) > MAX_BYTES:
            raise BatchApiError(413, "the file is larger than 200 MB")
        file_id = f"file-{uuid.uuid4().hex[:24]}"
        self.contents[file_id] = data
        self.files[file_id] = {
            "id": file_id, "object": "file", "bytes": len(data), "created_at": int(time.time()),
            "filename": name, "purpose": purpose, "status": "processed",
        }  # fmt: skip
        return self.files[file_id]

    def list_files(self) -> list[dict[str, Any]]:
        """Return all files, newest first."""
        return list(self.files.values())[::-1]

    def retrieve_file(self, file_id: str) -> dict[str, Any]:
        """Return one file's description."""
        if file_id not in self.files:
            raise BatchApiError(404, f"no file {file_id}")
        return self.files[file_id]

    def read_file(self, file_id: str) -> bytes:
        """Return one file's content."""
        self.retrieve_file(file_id)
        return self.contents[file_id]

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Create a job over an uploaded file and start it in a thread. Raises BatchApiError."""
        if body.get("endpoint") != ENDPOINT:
            raise BatchApiError(400, f"endpoint must be {ENDPOINT}")
        self.retrieve_file(str(body.get("input_file_id")))
        batch_id = f"batch_{uuid.uuid4().hex[:24]}"
        # All keys exist from the start: the job's thread changes values while requests serialize the dict.
        batch = {
            "id": batch_id, "object": "batch", "endpoint": ENDPOINT, "errors": None,
            "input_file_id": body["input_file_id"], "completion_window": body.get("completion_window", "24h"),
            "status": "validating", "output_file_id": None, "error_file_id": None,
            "created_at": int(time.time()), "metadata": body.get("metadata"),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }  # fmt: skip
        self.batches[batch_id] = batch
        threading.Thread(target=self.run, args=(batch,), daemon=True).start()  # returns at once, as OpenAI's API does
        return batch

    def list_batches(self) -> list[dict[str, Any]]:
        """Return all jobs, newest first."""
        return list(self.batches.values())[::-1]

    def retrieve(self, batch_id: str) -> dict[str, Any]:
        """Return one job."""
        if batch_id not in self.batches:
            raise BatchApiError(404, f"no batch {batch_id}")
        return self.batches[batch_id]

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Request cancellation; the job ends after its current row."""
        batch = self.retrieve(batch_id)
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "cancelling"
        return batch

    def run(self, batch: dict[str, Any]) -> None:
        """Run a job from `validating` to a terminal status, updating `batch` in place."""
        with self.turn:  # one job at a time; the others stay in `validating`
            try:
                rows = check_rows(self.contents[batch["input_file_id"]])
            except BatchApiError as error:
                batch["errors"] = {"object": "list", "data": [{"code": "invalid", "message": error.message}]}
                batch["status"] = "failed"
                return
            batch["request_counts"]["total"] = len(rows)
            if batch["status"] == "validating":  # not where it was cancelled while it waited for its turn
                batch["status"] = "in_progress"
            good: list[dict[str, Any]] = []
            bad: list[dict[str, Any]] = []
            for row in rows:
                if batch["status"] == "cancelling":
                    fault = {"code": "batch_cancelled", "message": "the batch was cancelled"}
                    bad.append({"custom_id": row["custom_id"], "response": None, "error": fault})
                    continue
                line, is_good = self.run_row(row)
                (good if is_good else bad).append(line)
                batch["request_counts"]["completed" if is_good else "failed"] += 1
            is_cancelled = batch["status"] == "cancelling"
            # The terminal status comes after the files: a client that sees it reads them at once.
            batch["status"] = "finalizing"
            for name, lines in (("output", good), ("error", bad)):
                if lines:
                    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
                    file = self.add_file(f"{batch['id']}_{name}.jsonl", data, purpose="batch_output")
                    batch[f"{name}_file_id"] = file["id"]
            batch["status"] = "cancelled" if is_cancelled else "completed"

    def run_row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return a row's output line, and whether it succeeded."""
        status, body = 200, {}
        try:
            body = self.answer(row["body"])
        except BatchApiError as error:
            status, body = error.status, {"error": {"message": error.message}}
        except Exception as error:  # of this row alone: the thread that serves the job must reach a terminal status
            status, body = 500, {"error": {"message": f"{type(error).__name__}: {error}"}}
        request_id = uuid.uuid4().hex
        line = {
            "id": f"batch_req_{request_id[:24]}",
            "custom_id": row["custom_id"],
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        }
        return line, status == 200  # a failed row goes to the error file, with its response


def check_rows(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of an input file. Raises BatchApiError if any is malformed, as providers do."""
    rows, seen = [], set()
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BatchApiError(400, f"line {number} is not JSON") from error
        if not isinstance(row, dict) or {"custom_id", "method", "url", "body"} - set(row):
            raise BatchApiError(400, f"line {number} lacks custom_id, method, url or body")
        if row["url"] != ENDPOINT or row["method"] != "POST":
            raise BatchApiError(400, f"line {number} does not POST to {ENDPOINT}")
        if not isinstance(row["custom_id"], str):
            raise BatchApiError(400, f"line {number}: custom_id is not a string")
        if row["custom_id"] in seen:
            raise BatchApiError(400, f"line {number} repeats custom_id {row['custom_id']}")
        seen.add(row["custom_id"])
        rows.append(row)
    if not rows:
        raise BatchApiError(400, "the file has no rows")
    return rows
