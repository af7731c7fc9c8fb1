"""What answers in place of a tracking server, such as an ingress or a proxy, and what that means."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tasks.errors import ConfigError, LikenessError, ServiceUnavailable
from tasks.services.config import TrackingConfig
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tests.support.config import make_config


class FixedHandler(BaseHTTPRequestHandler):
    """Answers every request with the server's status and body."""

    status, body = 200, b""

    def do_GET(self) -> None:  # the names that http.server looks for
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def tracker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MlflowTracker]:
    """A tracker of a server that answers with the parameter's status and body."""
    status, body = request.param
    handler = type("Handler", (FixedHandler,), {"status": status, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        tracker = MlflowTracker(
            make_config(TrackingConfig, uri=f"http://127.0.0.1:{server.server_port}"), folder=tmp_path
        )
        tracker.run_id = "0" * 32
        yield tracker
        server.shutdown()


@pytest.mark.parametrize("tracker", [(status, b"") for status in (500, 502, 503, 504)], indirect=True)
def test_a_gateway_without_its_server_is_unreachable(tracker: MlflowTracker) -> None:
    with pytest.raises(ServiceUnavailable, match=r"answers with HTTP 50\d; start it, or set tracking=none$"):
        tracker.check()


@pytest.mark.parametrize("tracker", [(401, b""), (403, b""), (404, b"")], indirect=True)
def test_a_server_without_a_health_check_is_reachable(tracker: MlflowTracker) -> None:
    tracker.check()


@pytest.mark.parametrize(
    ("tracker", "kind"),
    [
        ((404, b"<h1>default backend - 404</h1>"), ServiceUnavailable),
        ((404, b'{"message": "no route matched"}'), ServiceUnavailable),
        ((404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "No such run"}'), ConfigError),
        ((401, b"who are you"), ConfigError),
    ],
    indirect=["tracker"],
)
def test_a_404_is_a_refusal_only_with_an_error_code_of_mlflow(
    tracker: MlflowTracker, kind: type[LikenessError]
) -> None:
    with pytest.raises(LikenessError) as raised:
        tracker.set_tag("a", "b")
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)
