"""A read-only web server of an output folder: runs, reports, pages of many subjects and of sweeps.

Nothing but a fixed set of files is served, each below a folder whose name was found by listing, so that no path of a
request is ever opened.
"""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from urllib.parse import unquote, urlsplit

import tasks.publishing
from flows.cli.serve.model_files import MODEL_ROUTE, list_model_files, render_listing
from flows.cli.serve.pages import render_index, with_links
from flows.runs.records import list_run_folders, list_summaries, read_summary
from tasks.errors import ConfigError

HOST = "127.0.0.1"
KINDS = {
    "index.html": "text/html; charset=utf-8",
    "report.html": "text/html; charset=utf-8",
    "table.csv": "text/csv; charset=utf-8",
    "summary.json": "application/json",
}
REPORT_SCRIPT = Path(tasks.publishing.__path__[0]) / "report" / "report.js"
MAX_CONNECTIONS = 64
# The pages hold their styles and pictures; another script than the report's, or a request to anywhere, is not ours.
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {script}; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# The page of many subjects links to `../../RUN/report.html`, which holds in the output folder too.
ROUTE = re.compile(r"(?:/(?P<kind>runs|many|sweeps))?/(?P<name>[^/]+)/(?P<file>[\w.-]+)")


@dataclass(frozen=True)
class Answer:
    """What a request gets."""

    status: HTTPStatus
    kind: str
    body: bytes = b""
    file: Path | None = None
    """Sent instead of the body, as a download."""

    @property
    def size(self) -> int:
        """Bytes of what is sent."""
        return len(self.body) if self.file is None else self.file.stat().st_size


NOTHING = Answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is no such page; / lists the runs\n")


def find_download(output: Path, name: str, path: str) -> Answer:
    """Return a file of a run's published model, or the list of them."""
    files = list_model_files(output, name)
    if files and not path:
        return Answer(HTTPStatus.OK, KINDS["index.html"], render_listing(name, files).encode())
    return Answer(HTTPStatus.OK, "application/octet-stream", file=files[path]) if path in files else NOTHING


def find_answer(output: Path, target: str) -> Answer:
    """Return the answer to a request's target."""
    path = unquote(urlsplit(target).path)
    if path in ("/", "/index.html"):
        reports = [folder.name for folder in list_run_folders(output) if (folder / "report.html").is_file()]
        page = render_index(list_summaries(output), pages=list_pages(output), reports=reports)
        return Answer(HTTPStatus.OK, KINDS["index.html"], page.encode())
    if path == "/health":
        return Answer(HTTPStatus.OK, "application/json", b'{"status": "ok"}')
    if path == "/runs.json":
        rows = [summary.model_dump(mode="json", exclude_unset=True) for summary in list_summaries(output)]
        return Answer(HTTPStatus.OK, KINDS["summary.json"], json.dumps(rows).encode())
    asked = MODEL_ROUTE.fullmatch(path)
    if asked is not None:
        return find_download(output, asked["name"], asked["path"])
    found = ROUTE.fullmatch(path)
    file = find_file(output, found["kind"] or "runs", found["name"], file=found["file"]) if found else None
    if file is None:
        return NOTHING
    body = file.read_bytes()
    if file.name == "report.html" and file.parent.parent == output:
        body = with_links(body.decode(errors="replace"), read_summary(file.parent)).encode()
    return Answer(HTTPStatus.OK, KINDS[file.name], body)


def find_safely(output: Path, target: str, *, host: str) -> Answer:
    """Return the answer to a request: a refusal where another site sent it, an error where the page can't be read."""
    try:
        name = urlsplit(f"//{host}").hostname
        # A web page elsewhere whose name resolves to loopback (DNS rebinding) sends its own name.
        if name not in (HOST, "localhost", "::1"):
            return Answer(HTTPStatus.FORBIDDEN, "text/plain", b"this server answers loopback addresses alone\n")
        return find_answer(output, target)
    except (OSError, ValueError) as error:  # a run that is being deleted, a malformed address
        return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{type(error).__name__}\n".encode())


def find_file(output: Path, kind: str, name: str, *, file: str) -> Path | None:
    """Return a file that may be served, or None."""
    if file not in KINDS:
        return None
    folders = list_run_folders(output) if kind == "runs" else sorted((output / kind).glob("*/"))
    wanted = [folder / file for folder in folders if folder.name == name]
    # A link, of the file or of its folder, could lead anywhere.
    root = output.resolve()
    return next((path for path in wanted if path.is_file() and path.resolve() == root / path.relative_to(output)), None)


def list_pages(output: Path) -> list[str]:
    """Return the addresses of the pages of many subjects and of sweeps."""
    found = [*sorted(output.glob("many/*/index.html")), *sorted(output.glob("sweeps/*/report.html"))]
    return [path.relative_to(output).as_posix() for path in found]


Request = socket.socket | tuple[bytes, socket.socket]


class QuietServer(ThreadingHTTPServer):
    """A server that prints nothing of broken connections."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Request, client_address: object) -> None:
        """Handle a connection in a thread of its own; one too many is closed."""
        if not self.slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started
            self.slots.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Request, client_address: object) -> None:
        """Handle a connection, and make room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Drop the error: it concerns one connection alone."""


def make_headers() -> dict[str, str]:
    """Return the headers of every answer; the report's script is allowed by its digest."""
    script = base64.b64encode(hashlib.sha256(REPORT_SCRIPT.read_bytes()).digest()).decode()
    return {name: value.replace("{script}", f"'sha256-{script}'") for name, value in SECURITY.items()}


def make_handler(output: Path) -> type[BaseHTTPRequestHandler]:
    """Return the handler of an output folder."""
    headers = make_headers()

    class Handler(BaseHTTPRequestHandler):
        server_version = "likeness"
        sys_version = ""
        timeout = 30  # seconds; an idle connection holds a thread

        def do_GET(self) -> None:  # the name that http.server looks for
            self.respond()

        def do_HEAD(self) -> None:
            self.respond()

        def respond(self) -> None:
            answer = find_safely(output, self.path, host=self.headers.get("Host", ""))
            with contextlib.suppress(OSError):  # whoever asked has gone
                self.send(answer)

        def send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in {
                "Content-Type": answer.kind,
                "Content-Length": str(answer.size),
                **headers,
                **({"Content-Disposition": "attachment"} if answer.file is not None else {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if answer.file is None:
                self.wfile.write(answer.body)
                return
            with answer.file.open("rb") as file:  # streamed: weights may be larger than memory
                shutil.copyfileobj(file, self.wfile)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: requests are of no interest."""

    return Handler


def serve_runs(output: Path, port: int, *, is_opened: bool) -> int:
    """Serve until interrupted. Raises ConfigError where the port is in use."""
    output = output.absolute()
    try:
        server = QuietServer((HOST, port), make_handler(output))
    except OSError as error:
        raise ConfigError(f"port {port} is in use by another program; choose one with --port") from error
    signal.signal(signal.SIGTERM, make_stop(server))
    url = f"http://{HOST}:{server.server_address[1]}"
    print(f"{url}  runs in {output}; Ctrl-C stops", flush=True)
    if is_opened:
        import webbrowser

        webbrowser.open(url)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return 0


def make_stop(server: ThreadingHTTPServer) -> Callable[[int, FrameType | None], None]:
    """Return a signal handler that ends `serve_forever` as Ctrl-C does."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    return stop
