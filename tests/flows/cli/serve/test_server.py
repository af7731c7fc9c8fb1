"""The report server: an index, reports with links, and nothing else of the disk."""

import base64
import contextlib
import hashlib
import http.client
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from conf.request import RunRequest
from flows.cli.results.runs import explain_no_report
from flows.cli.serve.server import HOST, MAX_CONNECTIONS, QuietServer, make_handler, serve_runs
from flows.runs.records import link_model, read_summary, write_request, write_start, write_summary
from tasks.errors import ConfigError
from tasks.publishing.report.template import FOLDER
from tests.support.summary import make_measured_summary

RUN = "20260101-000000-fish-0001"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder with a finished run, a running one, and files beside them that are nobody's business."""
    output = tmp_path / "runs"
    for name in (RUN, "20260102-000000-fish-0002"):
        (output / name).mkdir(parents=True)
        write_request(output / name, RunRequest(), is_trusted=True)
        write_start(output / name, name)
    links = {"prefect": "http://127.0.0.1:4200/runs/1?a=1&b=2", "mlflow": "javascript:alert(1)"}
    finished = read_summary(output / RUN).model_copy(update={"status": "finished", "links": links})
    write_summary(output / RUN, finished)
    (output / RUN / "report.html").write_text("<html><body><h1>Our fish</h1></body></html>")
    (output / RUN / "ledger.jsonl").write_text("secret")
    (output / "many" / "x").mkdir(parents=True)
    (output / "many" / "x" / "index.html").write_text("<p>many</p>")
    (output / "many" / "x" / "table.csv").symlink_to(output / RUN / "ledger.jsonl")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "index.html").write_text("secret")
    (output / "many" / "y").symlink_to(tmp_path / "elsewhere")
    (output / "damaged").mkdir()
    os.mkfifo(output / "damaged" / "summary.json")
    write_request(output / "damaged", RunRequest(), is_trusted=True)
    (output / "mlflow.db").write_text("secret")
    (tmp_path / "report.html").write_text("secret")
    return output


@pytest.fixture
def server(output: Path) -> Iterator[int]:
    with ThreadingHTTPServer((HOST, 0), make_handler(output)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def get(port: int, path: str, *, method: str = "GET", host: str = "") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    connection.request(method, path, headers={"Host": host or f"{HOST}:{port}"})
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text, {name.lower(): value for name, value in reply.getheaders()}


def test_the_index_lists_runs_with_reports_and_pages(server: int) -> None:
    status, text, headers = get(server, "/")
    assert status == 200
    assert f'href="/runs/{RUN}/report.html"' in text
    assert "20260102-000000-fish-0002" in text
    assert 'href="/many/x/index.html"' in text
    assert 'href="http://127.0.0.1:4200/runs/1?a=1&amp;b=2"' in text
    assert "javascript:" not in text
    assert "default-src 'none'" in headers["content-security-policy"]


def test_the_index_shows_means_with_their_intervals(output: Path, server: int) -> None:
    write_summary(output / RUN, make_measured_summary(RUN))
    text = get(server, "/")[1]
    assert '<td class="n" data-label="CLIP-I">0.60</td><td class="n" data-label="CLIP-T">0.30</td>' in text
    assert "3.50 [3.00, 3.90]" in text


def test_only_the_script_of_the_report_may_run(server: int) -> None:
    policy = get(server, f"/runs/{RUN}/report.html")[2]["content-security-policy"]
    [allowed] = re.findall(r"script-src ([^;]+);", policy)
    digest = hashlib.sha256((FOLDER / "report.js").read_bytes()).digest()
    assert allowed == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_idle_connections_are_bounded_and_make_room_again(output: Path) -> None:
    with QuietServer((HOST, 0), make_handler(output)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        idle = [socket.create_connection((HOST, port), timeout=30) for _ in range(MAX_CONNECTIONS)]
        try:
            with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
                get(port, "/health")
        finally:
            for connection in idle:
                connection.close()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
                assert get(port, "/health")[0] == 200
                break
            time.sleep(0.05)
        else:
            pytest.fail("no connection was served after the idle ones had closed")
        server.shutdown()


def test_a_run_without_a_report_is_listed_without_a_link(output: Path, server: int) -> None:
    (output / RUN / "report.html").unlink()
    text = get(server, "/")[1]
    assert RUN in text
    assert f'href="/runs/{RUN}/report.html"' not in text


def test_the_command_says_why_there_is_no_report(output: Path) -> None:
    (output / RUN / "report.html").unlink()
    assert "was removed; run it again" in explain_no_report(output / RUN)
    assert "did not finish (running)" in explain_no_report(output / "20260102-000000-fish-0002")


def test_a_report_has_links_to_the_other_servers(server: int) -> None:
    status, text, _ = get(server, f"/runs/{RUN}/report.html")
    assert status == 200
    assert "<h1>Our fish</h1>" in text
    assert text.index("Prefect run") < text.index("Our fish")
    assert "javascript:" not in text
    assert get(server, "/many/x/index.html")[1] == "<p>many</p>"
    assert get(server, f"/{RUN}/report.html")[0] == 200  # as that page links it: `../../RUN/report.html`
    assert '"status": "finished"' in get(server, f"/runs/{RUN}/summary.json")[1]


def publish(output: Path, *, key: str = "k", stage: str = "06-publishing") -> Path:
    """Put a model into the store and link the run's folder to it; return the model's folder."""
    model = output / "store" / stage / key / "model"
    (model / "unet").mkdir(parents=True)
    (model / "lora <1>.safetensors").write_bytes(b"weights" * 1000)
    (model / "unet" / "config.json").write_text("{}")
    (model / "elsewhere").symlink_to(output / "mlflow.db")
    link_model(output / RUN, f"../store/{stage}/{key}/model")
    return model


def test_the_models_files_can_be_downloaded(output: Path, server: int) -> None:
    publish(output)
    for prefix in ("/runs/", "/"):
        status, text, _ = get(server, f"{prefix}{RUN}/model/")
        assert status == 200
        assert 'href="lora%20%3C1%3E.safetensors">lora &lt;1&gt;.safetensors</a> 0.01 MB' in text
        assert "elsewhere" not in text
        status, text, headers = get(server, f"{prefix}{RUN}/model/lora%20%3C1%3E.safetensors")
        assert (status, text) == (200, "weights" * 1000)
        assert (headers["content-disposition"], headers["content-length"]) == ("attachment", "7000")
    assert get(server, f"/runs/{RUN}/model/unet/config.json")[1] == "{}"
    status, text, headers = get(server, f"/runs/{RUN}/model/unet/config.json", method="HEAD")
    assert (text, headers["content-length"]) == ("", "2")


def test_the_files_of_an_evaluated_model_can_be_downloaded(output: Path, server: int) -> None:
    publish(output, stage="03-training")
    assert get(server, f"/runs/{RUN}/model/unet/config.json")[1] == "{}"


@pytest.mark.parametrize("path", ["elsewhere", "../manifest.json", "..%2f..%2f..%2fmlflow.db", "unet", "/etc/passwd"])
def test_only_listed_files_of_the_model_are_served(output: Path, server: int, path: str) -> None:
    model = publish(output)
    (model.parent / "manifest.json").write_text("secret")
    status, text, _ = get(server, f"/runs/{RUN}/model/{path}")
    assert status == 404
    assert "secret" not in text


def test_a_link_that_leads_to_anything_but_a_published_model_is_not_followed(output: Path, server: int) -> None:
    outside = output.parent / "06-publishing" / "k" / "model"
    outside.mkdir(parents=True)
    (outside / "a.safetensors").write_text("secret")
    for target in (outside, output / "many" / "x", output / RUN):
        (output / RUN / "model").unlink(missing_ok=True)
        (output / RUN / "model").symlink_to(target)
        assert get(server, f"/runs/{RUN}/model/")[0] == 404
        assert get(server, f"/runs/{RUN}/model/a.safetensors")[0] == 404
        assert get(server, f"/runs/{RUN}/model/ledger.jsonl")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        f"/runs/{RUN}/ledger.jsonl",
        f"/runs/{RUN}/request.json",
        f"/runs/{RUN}/../../mlflow.db",
        f"/runs/{RUN}/..%2f..%2fmlflow.db",
        "/runs/../report.html",
        "/runs/..%2f/report.html",
        "/runs/%2e%2e/report.html",
        "/many/../report.html",
        "/many/x/table.csv",  # a link that leads elsewhere
        "/many/y/index.html",  # a folder that is one
        "/mlflow.db",
        "//etc/passwd",
        "/runs/none/report.html",
        f"/runs/{RUN}/report.html%00",
        "/sweeps/x/report.html",
        "http://[/",
    ],
)
def test_nothing_else_is_served(server: int, path: str) -> None:
    status, text, _ = get(server, path)
    assert status in (400, 404, 500)
    assert "secret" not in text


def test_other_hosts_and_methods_are_refused(server: int) -> None:
    assert get(server, "/", host="evil.example")[0] == 403
    assert get(server, "/", host="localhost")[0] == 200
    assert get(server, "/", host="[")[0] == 500
    assert get(server, "/", method="POST")[0] == 501
    status, text, headers = get(server, "/", method="HEAD")
    assert (status, text) == (200, "")
    assert int(headers["content-length"]) > 0


def test_a_port_in_use_is_one_line_with_the_way_out(server: int, output: Path) -> None:
    with pytest.raises(ConfigError, match="choose one with --port"):
        serve_runs(output, server, is_opened=False)
