"""The mini vision server: OpenAI-compatible, on loopback only, limited to the drawn world.

python -m tasks.mini.vision_server --port 8123
"""

import argparse
import base64
import binascii
import ipaddress
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from tasks.mini.vision_server.batch_api import BatchApiError, InMemoryBatchApi

MODEL = "mini-vision"


class ChatHandler:
    """Answers chat completions; loads the mini CLIP with the first request."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.vision: Any = None

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a chat completion. Raises BatchApiError for a request that can't be answered."""
        from tasks.mini.vision_server.chat_response import write_message

        # One request at a time: the model runs single-threaded, and must not be loaded twice.
        with self.lock:
            if self.vision is None:
                from tasks.mini.vision_server.vision import VisionModel

                self.vision = VisionModel()
            question = read_messages(body, self.vision)
            message, finish_reason = write_message(body, question)
        written = message["content"] or json.dumps(message.get("tool_calls"))
        # Rough counts suffice, but not zero ones: the client treats missing usage as a fault.
        num_in = len(question.text.split()) + 64 * len(question.images)
        usage = {"prompt_tokens": num_in, "completion_tokens": len(written) // 4}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex[:24]}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": MODEL,
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }


def read_messages(body: dict[str, Any], vision: Any) -> Any:
    """Return the user messages' text and pictures, with tool results, as a Question. Raises BatchApiError."""
    from tasks.mini.vision_server.schema_answers import Question
    from tasks.mini.vision_server.vision import open_picture

    if body.get("model") != MODEL:
        raise BatchApiError(404, f"model {body.get('model')!r} is not served here; ask for {MODEL}")
    texts: list[str] = []
    images: list[Any] = []
    tool_results: list[str] = []
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BatchApiError(400, "messages is missing")
    for message in messages:
        content = message.get("content") or ""
        if message.get("role") == "tool":
            tool_results.append(str(content))
        elif message.get("role") == "user" and isinstance(content, str):
            tool_results.clear()  # earlier tool results belong to the previous turn
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts if message.get("role") == "user" else []:
            if part.get("type") == "text":
                texts.append(str(part["text"]))
            elif part.get("type") == "image_url":
                images.append(open_data_url(str(part["image_url"]["url"]), open_picture))
    return Question("\n".join(texts), images, vision, texts[-1] if texts else "", tool_results)


def open_data_url(url: str, open_picture: Any) -> Any:
    """Return the picture of a data URL; other URLs are refused, never fetched. Raises BatchApiError."""
    head, _, payload = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise BatchApiError(400, "image_url must be a base64 data URL; addresses are not fetched")
    try:
        return open_picture(base64.b64decode(payload, validate=True))
    except (ValueError, binascii.Error) as error:
        raise BatchApiError(400, str(error)) from error


def make_app() -> FastAPI:
    """Return the application."""
    app = FastAPI(title="likeness mini vision server", docs_url=None, redoc_url=None)
    handler = ChatHandler()
    batch_api = InMemoryBatchApi(handler.answer)

    @app.exception_handler(BatchApiError)
    def refuse(_: Request, error: BatchApiError) -> JSONResponse:
        detail = {"message": error.message, "type": "invalid_request_error", "code": None, "param": None}
        return JSONResponse({"error": detail}, status_code=error.status)

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "likeness"}]}

    @app.post("/v1/chat/completions", response_model=None)
    def complete(body: dict[str, Any]) -> dict[str, Any] | StreamingResponse:
        completion = handler.answer(body)
        if body.get("stream"):
            return StreamingResponse(stream(completion, body), media_type="text/event-stream")
        return completion

    @app.post("/v1/files")
    def upload(request: Request, file: UploadFile) -> dict[str, Any]:
        return batch_api.add_file(file.filename or "file", file.file.read(), purpose="batch")

    @app.get("/v1/files")
    def list_files() -> dict[str, Any]:
        return {"object": "list", "data": batch_api.list_files(), "has_more": False}

    @app.get("/v1/files/{file_id}")
    def retrieve_file(file_id: str) -> dict[str, Any]:
        return batch_api.retrieve_file(file_id)

    @app.get("/v1/files/{file_id}/content")
    def download(file_id: str) -> PlainTextResponse:
        return PlainTextResponse(batch_api.read_file(file_id))

    @app.post("/v1/batches")
    def create_batch(body: dict[str, Any]) -> dict[str, Any]:
        return batch_api.create(body)

    @app.get("/v1/batches")
    def list_batches(limit: int = 20) -> dict[str, Any]:
        return {"object": "list", "data": batch_api.list_batches()[:limit], "has_more": False}

    @app.get("/v1/batches/{batch_id}")
    def retrieve_batch(batch_id: str) -> dict[str, Any]:
        return batch_api.retrieve(batch_id)

    @app.post("/v1/batches/{batch_id}/cancel")
    def cancel_batch(batch_id: str) -> dict[str, Any]:
        return batch_api.cancel(batch_id)

    return app


def stream(completion: dict[str, Any], body: dict[str, Any]) -> Iterator[str]:
    """Yield a finished completion as server-sent events, 24 characters at a time."""
    choice = completion["choices"][0]
    head = {key: completion[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    content = choice["message"]["content"] or ""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": content[i : i + 24]} for i in range(0, len(content), 24)]
    for index, call in enumerate(choice["message"].get("tool_calls") or []):
        function = call["function"]
        # As OpenAI streams a call: id and name with empty arguments, then the arguments by index.
        deltas.append({"tool_calls": [{**call, "index": index, "function": {**function, "arguments": ""}}]})
        deltas.append({"tool_calls": [{"index": index, "function": {"arguments": function["arguments"]}}]})
    # The last chunk has an empty delta and the finish reason.
    reasons = [None] * len(deltas) + [choice["finish_reason"]]
    for delta, reason in zip([*deltas, {}], reasons, strict=True):
        yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"
    # Usage comes in a chunk of its own, without choices.
    if (body.get("stream_options") or {}).get("include_usage"):
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': completion['usage']})}\n\n"
    yield "data: [DONE]\n\n"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket on loopback. Raises SystemExit for other hosts: the server has no authentication."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise SystemExit(f"refusing to listen on {host}: the mini vision server has no keys; use 127.0.0.1")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # binds despite sockets in TIME_WAIT
    try:
        listener.bind((host, port))
        listener.listen(64)
    except OSError as error:
        raise SystemExit(f"cannot listen on {host}:{port}: {error.strerror}; use another --port") from error
    return listener


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.mini.vision_server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="loopback address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    options = parser.parse_args(argv)
    listener = bind(options.host, options.port)
    # Before torch is imported, which is when it reads the variable; that import comes with the first request.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    host = f"[{options.host}]" if ":" in options.host else options.host
    # The socket listens already: a client that connects before the server runs waits in the backlog.
    print(f"http://{host}:{listener.getsockname()[1]}/v1", flush=True)
    server = uvicorn.Server(uvicorn.Config(make_app(), log_level="warning"))
    server.run(sockets=[listener])
