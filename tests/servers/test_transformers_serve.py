"""`transformers serve` with a tiny vision-language model: a server that ignores how a schema is asked for."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.errors import ConfigError, ReplyInvalid, ServiceUnavailable
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.doctor import examine
from tests.servers.served import Seen, ask_color, fill_picture, find_port, make_llm, serving
from tests.servers.tiny_vlm import make_tiny_vlm


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The API's address and the model's id."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn: make setup")
    folder = tmp_path_factory.mktemp("vlm")
    model = f"{make_tiny_vlm(folder / 'model')}@main"  # it answers under this id, so it is asked by it
    (folder / "hub").mkdir()
    program, port = Path(sys.executable).parent / "transformers", find_port()
    command = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    ready = f"http://127.0.0.1:{port}/health"
    hub = str(folder / "hub")  # without this folder its list of models fails
    with serving(command, ready=ready, log=folder / "log", HF_HUB_CACHE=hub, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"):
        yield f"http://127.0.0.1:{port}/v1", model


@pytest.mark.parametrize("color", ["red", "green", "blue"])
@pytest.mark.parametrize("response_format", ["auto", "json_mode", "text"])
def test_an_image_request_returns_the_reply_of_the_model(
    served: tuple[str, str], tmp_path: Path, response_format: str, color: str
) -> None:
    llm = make_llm(*served, tmp_path, response_format=response_format)
    assert ask_color(llm, color) == color
    row = llm.ledger.rows[-1]
    assert (row.outcome, row.served_model) == ("ok", served[1])
    assert row.usage.input_tokens > 16  # a picture's worth
    assert row.usage.output_tokens == 2


def test_doctor_findings_match_the_capabilities_of_the_server(served: tuple[str, str], tmp_path: Path) -> None:
    llm = make_llm(*served, tmp_path)
    # It lists what lies in its cache, not the folder that it serves, and has no batches.
    found = {finding.name: finding for finding in examine(llm, "p")}
    assert {name for name, finding in found.items() if not finding.is_good} == {"models", "tools", "batch"}
    assert found["images"].detail.startswith("supported")


def test_a_missing_tool_call_is_an_invalid_reply(served: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ReplyInvalid, match="the reply is empty"):
        ask_color(make_llm(*served, tmp_path, response_format="tool"), "red")


def test_an_unknown_request_field_is_a_configuration_error(served: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refuses the request: .*reasoning"):
        ask_color(
            make_llm(*served, tmp_path, response_format="text", extra_body={"reasoning": {"enabled": False}}), "red"
        )


def test_a_model_other_than_the_served_one_is_a_configuration_error(served: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pinned to"):
        ask_color(make_llm(served[0], "another", tmp_path, response_format="text"), "red")


def test_an_internal_server_error_raises_service_unavailable(served: tuple[str, str], tmp_path: Path) -> None:
    llm = make_llm(*served, tmp_path, response_format="text")
    body = RequestSpec("", ("look", fill_picture("red")), Seen).body(llm.config.profiles["p"], "text")
    body["messages"][1]["content"][1]["image_url"]["url"] = "data:image/png;base64,AAAA"
    from tasks.services.llm.chat.transport import complete
    from tasks.services.llm.retries import call_with_retries

    with pytest.raises(ServiceUnavailable, match="answered 500"):
        call_with_retries(lambda left: complete(llm.client("p"), body, timeout_seconds=left), llm.config.profiles["p"])
