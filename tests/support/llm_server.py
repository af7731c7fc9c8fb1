"""A small OpenAI-shaped server with scripted answers that counts what it is asked.

It follows the published chat, files and batches protocol (platform.openai.com/docs/api-reference)
and stands in for the faults that no honest server shows on demand.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tasks.mini.vision_server.batch_api import BatchApiError, InMemoryBatchApi

Answer = tuple[int, dict[str, str], bytes]


def completion(content: str | None, **changes: Any) -> dict[str, Any]:
    """Return a chat completion."""
    message = {"role": "assistant", "content": content, "refusal": changes.pop("refusal", None)}
    choice = {"index": 0, "message": message, "finish_reason": changes.pop("finish_reason", "stop")}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {
        "id": "c", "object": "chat.completion", "created": 1, "model": "asked-model-2026-11-01",
        "choices": [choice], "usage": usage, **changes,
    }  # fmt: skip


class ExpiringBatchApi(InMemoryBatchApi):
    """Ends every job after so many rows, as providers do after 24 hours: the rest is in the error file."""

    def __init__(self, answer: Any, *, num_done: int) -> None:
        super().__init__(answer)
        self.num_left = num_done

    def run_row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Answer a row, or say that there was no time for it."""
        if self.num_left <= 0:
            fault = {"code": "batch_expired", "message": "This request could not be executed before the batch expired."}
            return {"id": "r", "custom_id": row["custom_id"], "response": None, "error": fault}, False
        self.num_left -= 1
        return super().run_row(row)

    def retrieve(self, batch_id: str) -> dict[str, Any]:
        """Return one job; one that lacks rows has expired."""
        batch = super().retrieve(batch_id)
        is_short = batch["status"] == "completed" and batch["request_counts"]["failed"]
        return {**batch, "status": "expired"} if is_short else batch


class ScriptedServer:
    """Answers chat from a list, the last answer for ever; files and batches from a desk."""

    def __init__(self) -> None:
        self.answers: list[Answer | str] = []
        self.counts: Counter[str] = Counter()
        self.asking = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.batch_api = InMemoryBatchApi(self.answer_row)
        self.url = ""
        self.models: list[dict[str, Any]] = [
            {"id": "asked-model", "object": "model", "created": 1, "owned_by": "somebody"}
        ]

    def script(self, *answers: Answer | str) -> None:
        """Set the answers: a reply's text, or a whole response."""
        self.answers = list(answers)

    def next_answer(self) -> Answer:
        """Take the next answer."""
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, str):
            return 200, {}, json.dumps(completion(answer)).encode()
        return answer

    def answer_row(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer one row of a batch."""
        self.counts["row"] += 1
        status, _, data = self.next_answer()
        if status != 200:
            raise BatchApiError(status, "scripted failure")
        loaded: dict[str, Any] = json.loads(data)
        return loaded


class BusyBatchApi(InMemoryBatchApi):
    """Accepts jobs and never begins one."""

    def run(self, batch: dict[str, Any]) -> None:
        """Leave a job in progress."""
        batch["status"] = "in_progress"

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """End a job, none of whose rows is answered."""
        batch = super().cancel(batch_id)
        super().run(batch)
        return batch


class BusyServer(ScriptedServer):
    """A provider whose batch jobs stay in progress until they are cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_api = BusyBatchApi(self.answer_row)


class JudgeRun(ScriptedServer):
    """Gives every sample the same grades."""

    def answer_row(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer one row of a batch."""
        self.counts["row"] += 1
        schema = body["response_format"]["json_schema"]["schema"]["properties"]
        reply = {name: "e" if "enum" not in field else field["enum"][-1] for name, field in schema.items()}
        reply |= {name: 3 for name, field in schema.items() if 3 in field.get("enum", [])}
        return completion(json.dumps(reply))


def make_handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    """Return the handler class of one server."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Stay quiet."""

        def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def send(self, value: Any) -> None:
            self.reply(200, {}, value if isinstance(value, bytes) else json.dumps(value).encode())

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            server.counts[f"POST {self.path}"] += 1
            if self.path.endswith("/cancel"):
                self.send(server.batch_api.cancel(self.path.split("/")[3]))
            elif self.path in ("/v1/chat/completions", "/v1/responses"):
                with server.asking:
                    server.bodies.append(json.loads(data))
                    answer = server.next_answer()
                self.reply(*answer)
            elif self.path == "/v1/files":
                start = data.index(b'{"body"')
                end = data.rindex(b"}\n") + 2
                self.send(server.batch_api.add_file("f.jsonl", data[start:end], purpose="batch"))
            elif self.path == "/v1/batches":
                try:
                    self.send(server.batch_api.create(json.loads(data)))
                except BatchApiError as error:
                    self.reply(error.status, {}, json.dumps({"error": {"message": error.message}}).encode())

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/v1/").split("/")
            server.counts[f"GET {path[0]}"] += 1
            try:
                if path == ["models"]:
                    self.send({"object": "list", "data": server.models})
                elif path == ["batches"]:
                    self.send({"object": "list", "data": server.batch_api.list_batches(), "has_more": False})
                elif path[0] == "batches":
                    self.send(server.batch_api.retrieve(path[1]))
                else:
                    self.send(server.batch_api.read_file(path[1]))
            except Exception as error:  # the desk refuses what it doesn't know
                status = error.status if isinstance(error, BatchApiError) else 404
                self.reply(status, {}, json.dumps({"error": {"message": str(error)}}).encode())

    return Handler


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free loopback port and yield the API's address."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # By default it looks twice a second whether it is stopped: three minutes over all tests.
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@contextmanager
def scripted_server(server: ScriptedServer | None = None) -> Iterator[ScriptedServer]:
    """Serve scripted answers."""
    server = server or ScriptedServer()
    with serving(make_handler(server)) as server.url:
        yield server
