"""A configured Prefect server that can't be used is one line, for every command that talks to it."""

from pathlib import Path

import prefect
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cli.stack.server import check_server
from tasks.errors import LikenessError
from tests.support.cli_sandbox import CliSandbox
from tests.support.http_server import serve


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (200, '"2.20.3"', 2, f"has version 2.20.3, this is {prefect.__version__}: their first numbers must be equal"),
        (200, "<html></html>", 2, "is none: its answer is no version; its address ends with /api"),
        (200, "{}", 2, "is none: its answer is no version"),
        (404, "", 2, "is none: it answers 404; its address ends with /api"),
        (401, "", 2, "refuses the credentials; set PREFECT_API_AUTH_STRING"),
        (500, "", 4, "answers 500"),
    ],
)
def test_a_server_that_cannot_be_used_is_named(status: int, body: str, code: int, message: str) -> None:
    with (
        serve(body, status=status) as url,
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(LikenessError) as caught,
    ):
        check_server()
    assert caught.value.exit_code == code
    assert f"the Prefect server at {url} {message}" in str(caught.value)


@pytest.mark.parametrize("words", [["run", "experiment=smoke", "tracking=none"], ["submit", "experiment=smoke"]])
def test_a_server_of_another_version_is_one_line(tmp_path: Path, words: list[str]) -> None:
    with serve('"2.20.3"') as url:
        done = CliSandbox(tmp_path, url).likeness(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"the Prefect server at {url} has version 2.20.3" in done.stderr


def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path, free_port: int) -> None:
    own = CliSandbox(tmp_path, f"http://user:secret@127.0.0.1:{free_port}/api")
    for words in (["run", "experiment=smoke", "tracking=none"], ["submit", "experiment=smoke"]):
        done = own.likeness(*words)
        assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
        assert "does not answer (ConnectError); start it, or unset PREFECT_API_URL" in done.stderr
        assert "secret" not in done.stderr


def test_a_server_without_our_deployments_is_one_line(tmp_path: Path, client: SyncPrefectClient) -> None:
    done = CliSandbox(tmp_path, str(client.api_url)).likeness("submit", "experiment=smoke")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "no deployment personalize-subject/personalize-subject; `python -m deployments.register" in done.stderr
