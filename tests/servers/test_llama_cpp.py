"""llama.cpp's server with random weights: only its grammar makes the replies fit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tasks.errors import ConfigError, ReplyInvalid, ServiceUnavailable
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.doctor import examine
from tasks.services.llm.service import LlmService
from tests.servers.served import SERVERS, Seen, ask_color, find_port, make_llm, need, serving
from tests.servers.tiny_gguf import make_tiny_gguf

HOW = "make test-llm-servers"
# Random weights write bytes that are no text, on which the server's own reader fails: only printable ones are allowed.
PRINTABLE = {"logit_bias": [[token, False] for token in (*range(3, 35), *range(130, 260))]}


class Noted(BaseModel):
    """A reply with room for any text."""

    note: str
    tags: list[str]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's API address."""
    program = need(SERVERS / "llama-server", HOW)
    folder, port = tmp_path_factory.mktemp("llama"), find_port()
    model = make_tiny_gguf(folder / "tiny.gguf")
    address = f"http://127.0.0.1:{port}"
    command = [
        program, "-m", model, "--alias", "tiny", "--host", "127.0.0.1", "--port", str(port), "--api-key", "sk-good",
        "--ctx-size", "4096", "--threads", "1", "--parallel", "1", "--seed", "0", "--offline",
    ]  # fmt: skip
    with serving(command, ready=f"{address}/health", log=folder / "log", seconds=60):
        yield f"{address}/v1"


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOD_KEY", "sk-good")
    monkeypatch.setenv("BAD_KEY", "sk-bad")


def make(url: str, folder: Path, response_format: str = "auto", **changes: Any) -> LlmService:
    fixed = {"api_key_variable": "GOOD_KEY", "extra_body": PRINTABLE, "max_output_tokens": 2000}
    return make_llm(url, "tiny", folder, response_format=response_format, **{**fixed, **changes})


def ask_often(llm: LlmService, times: int = 6) -> list[str]:
    """Return the colors that random weights name."""
    specs = [RequestSpec("", (f"Which color? {number}",), Seen) for number in range(times)]
    return [llm.ask(spec, role="inspector").reply.color for spec in specs]


@pytest.mark.parametrize("response_format", ["auto", "json_schema", "json_object"])
def test_a_json_schema_constrains_even_random_weights(url: str, tmp_path: Path, response_format: str) -> None:
    llm = make(url, tmp_path, response_format)
    assert set(ask_often(llm)) <= {"red", "green", "blue"}
    assert llm.response_format("p") == ("json_schema" if response_format == "auto" else response_format)
    assert {row.outcome for row in llm.ledger.rows} == {"ok"}
    assert {row.served_model for row in llm.ledger.rows} == {"tiny"}


def test_a_json_schema_constrains_free_text_and_lists(url: str, tmp_path: Path) -> None:
    reply = make(url, tmp_path, "json_schema").ask(RequestSpec("", ("Say something.",), Noted), role="inspector").reply
    assert reply.note.isascii()


@pytest.mark.parametrize("response_format", ["json_mode", "text"])
def test_prompt_instructions_alone_do_not_constrain_random_weights(
    url: str, tmp_path: Path, response_format: str
) -> None:
    llm = make(url, tmp_path, response_format)
    with pytest.raises(ReplyInvalid):
        ask_often(llm, 1)
    assert [row.outcome for row in llm.ledger.rows] == ["invalid", "invalid"]


def test_doctor_reports_missing_image_support(url: str, tmp_path: Path) -> None:
    llm = make(url, tmp_path)
    found = {finding.name: finding for finding in examine(llm, "p")}
    assert [found[name].is_good for name in ("models", "response format", "stream", "images")] == [
        True,
        True,
        True,
        False,
    ]


def test_an_image_request_without_image_support_raises_service_unavailable(url: str, tmp_path: Path) -> None:
    llm = make(url, tmp_path, "json_schema")
    with pytest.raises(ServiceUnavailable, match="answered 500"):
        ask_color(llm, "red")


def test_a_rejected_key_raises_an_error_naming_its_variable(url: str, tmp_path: Path) -> None:
    llm = make(url, tmp_path, "json_schema", api_key_variable="BAD_KEY")
    with pytest.raises(ConfigError, match="refuses the key in BAD_KEY"):
        ask_often(llm, 1)
