"""A small server of xAI's batch protocol that counts what it is asked.

After the published guide (docs.x.ai, Advanced API Usage, Batch API): a named container, rows added in
pieces, counters in place of a status, results in pages. No independent server implements it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlparse

from tests.support.llm_server import completion, serving


class XaiServer:
    """Containers in memory; rows are answered as they are added, unless the server is busy."""

    def __init__(self) -> None:
        self.batches: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.counts: Counter[str] = Counter()
        self.answer: Callable[[dict[str, Any]], str] = lambda body: '{"grade": 2}'
        self.is_busy = False
        self.cancelled: dict[str, int] = {}
        self.page = 3
        self.url = ""

    def create(self, name: str) -> dict[str, Any]:
        self.counts["create"] += 1
        batch_id = f"batch_{len(self.batches)}"
        self.batches[batch_id] = {"batch_id": batch_id, "name": name}
        self.rows[batch_id] = []
        return self.retrieve(batch_id)

    def add(self, batch_id: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.counts["add"] += 1
        self.counts["row"] += len(rows)
        self.rows[batch_id] += rows
        return {}

    def retrieve(self, batch_id: str) -> dict[str, Any]:
        num = len(self.rows[batch_id])
        failed = 0 if self.is_busy else sum(not self.answer(content_of(row)) for row in self.rows[batch_id])
        state = {
            "num_requests": num, "num_pending": num if self.is_busy else 0, "num_error": failed,
            "num_success": 0 if self.is_busy else num - failed, "num_cancelled": 0,
        }  # fmt: skip
        return {**self.batches[batch_id], "state": state}

    def cancel(self, batch_id: str) -> dict[str, Any]:
        self.counts["cancel"] += 1
        self.is_busy = False
        self.cancelled[batch_id] = len(self.rows[batch_id]) // 2  # the first half was done in time
        self.batches[batch_id]["cancel_time"] = "2026-11-22"
        return self.retrieve(batch_id)

    def results(self, batch_id: str, token: int) -> dict[str, Any]:
        self.counts["page"] += 1
        chosen = self.rows[batch_id][token : token + self.page]
        results = []
        for number, row in enumerate(chosen, token):
            content = self.answer(content_of(row)) if number < self.cancelled.get(batch_id, 10**9) else ""
            told: dict[str, Any] = {"batch_request_id": row["batch_request_id"]}
            if content:
                told["batch_result"] = {"response": {"chat_get_completion": completion(content)}}
            else:
                told["error_message"] = "the row failed"
            results.append(told)
        end = token + self.page
        return {"results": results, "pagination_token": str(end) if end < len(self.rows[batch_id]) else None}


def content_of(row: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = row["batch_request"]["chat_get_completion"]
    return body


def make_handler(server: XaiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Stay quiet."""

        def send(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
            parts = urlparse(self.path).path.removeprefix("/v1/batches").strip("/").split("/")
            if self.path.endswith("/chat/completions"):
                server.counts["chat"] += 1
                self.send(completion(server.answer(body)))
            elif parts[0].endswith(":cancel"):
                self.send(server.cancel(parts[0].removesuffix(":cancel")))
            else:
                self.send(
                    server.create(body["name"]) if parts == [""] else server.add(parts[0], body["batch_requests"])
                )

        def do_GET(self) -> None:
            address = urlparse(self.path)
            parts = address.path.removeprefix("/v1/batches").strip("/").split("/")
            if parts == [""]:
                self.send({"batches": [server.retrieve(batch_id) for batch_id in server.batches]})
            elif parts[0] not in server.batches:
                self.send({"error": {"message": "unknown"}}, 404)
            elif parts[1:] == ["results"]:
                self.send(server.results(parts[0], int(parse_qs(address.query).get("pagination_token", ["0"])[0])))
            else:
                self.send(server.retrieve(parts[0]))

    return Handler


@contextmanager
def xai_server() -> Iterator[XaiServer]:
    """Serve xAI's protocol."""
    server = XaiServer()
    with serving(make_handler(server)) as server.url:
        yield server
