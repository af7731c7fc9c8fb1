"""An HTTP proxy on loopback that injects faults and records what was delivered."""

import hashlib
import http.client
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["pass", "503", "cut", "deny"]
HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "expect")
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
XML = [("Content-Type", "application/xml"), ("Connection", "close")]
REFUSALS: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {
    "503": (503, XML, SLOW_DOWN),
    "deny": (403, XML, DENIED),
}
"""Answers of the proxy itself, which the server behind it doesn't see."""


@dataclass(frozen=True)
class Delivered:
    """A request whose response with status 200 reached its client."""

    at: float
    """Unix time in seconds."""
    path: str
    sha256: str
    """Of the request's body."""


class FaultProxy:
    """Forwards requests to one server; `mode` decides what happens to the responses."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname or "", parts.port or 80)
        self.mode: Mode = "pass"
        self.decide: Callable[[str, str], Mode] | None = None
        """From a request's method and path to what happens to it, in place of `mode`."""
        self.num_requests = 0
        self.delivered: list[Delivered] = []
        self.faults: Counter[str] = Counter()
        proxy = self

        class Handler(ForwardingHandler):
            """Bound to this proxy."""

            def owner(self) -> "FaultProxy":
                return proxy

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class QuietServer(ThreadingHTTPServer):
    """A server whose clients may vanish at any time."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that were killed in the middle of a request."""


class ForwardingHandler(BaseHTTPRequestHandler, ABC):
    """Forwards one request."""

    protocol_version = "HTTP/1.1"

    @abstractmethod
    def owner(self) -> FaultProxy:
        """Return the proxy that this handler works for."""

    def forward(self) -> None:
        proxy = self.owner()
        body = self.read_body()
        proxy.num_requests += 1
        mode = proxy.mode if proxy.decide is None else proxy.decide(self.command, self.path)
        if mode in REFUSALS:
            proxy.faults[mode] += 1
            self.respond(*REFUSALS[mode])
            self.close_connection = True
            return
        try:
            status, headers, data = self.ask(proxy.target, body)
        except (OSError, http.client.HTTPException):  # the server is dead: so is the connection
            self.close_connection = True
            return
        if mode == "cut":
            proxy.faults["cut"] += 1
            self.close_connection = True
            if data and self.command != "HEAD":
                self.respond(status, headers, data, cut=len(data) // 2)
            return
        if self.is_abandoned():  # nobody reads it: not delivered
            self.close_connection = True
            return
        self.respond(status, headers, data)
        if status == 200:
            digest = hashlib.sha256(body).hexdigest()
            proxy.delivered.append(Delivered(time.time(), self.path, digest))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def ask(self, target: tuple[str, int], body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Return the server's status, headers and body."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        connection = http.client.HTTPConnection(*target, timeout=120)
        try:
            connection.request(self.command, self.path, body or None, {**headers, "Content-Length": str(len(body))})
            response = connection.getresponse()
            data = response.read()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP]
            if self.command == "HEAD":  # the length of what a GET would return
                kept.append(("Content-Length", response.getheader("Content-Length") or "0"))
            return response.status, kept, data
        finally:
            connection.close()

    def respond(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: int | None = None) -> None:
        """Send a response; its body ends after `cut` bytes, where that is given."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        self.wfile.flush()

    def is_abandoned(self) -> bool:
        """Whether the client has closed its connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def log_message(self, *args: object) -> None:
        """Log nothing."""
