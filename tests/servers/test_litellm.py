"""LiteLLM's proxy before the mini vision server: keys, names, pictures, schemas, streams, batches."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.errors import ConfigError
from tasks.mini.vision_server.launch import LocalServer
from tasks.services.llm.batch.jobs import BatchOptions, ask_batch
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.doctor import examine
from tasks.services.llm.executor import AskOptions
from tests.servers.served import SERVERS, Seen, ask_color, fill_picture, find_port, make_llm, need, serving

HOW = "make test-llm-servers"
KEY = "sk-for-tests"
CONFIG = """
model_list:
  - model_name: canned
    litellm_params: {model: openai/canned, api_key: none, mock_response: '{"color": "red"}'}
  - model_name: mini-vision
    litellm_params: {model: openai/mini-vision, api_base: os.environ/OPENAI_BASE_URL, api_key: none}
files_settings:
  - {custom_llm_provider: openai, api_base: os.environ/OPENAI_BASE_URL, api_key: none}
litellm_settings: {telemetry: false, num_retries: 0, request_timeout: 60}
general_settings: {master_key: os.environ/LITELLM_MASTER_KEY, custom_auth: key_check.check_key}
"""
# Without a database its own check answers 400 to a wrong key and 500 to none.
KEY_CHECK = """
import os
import secrets

from litellm.proxy._types import LitellmUserRoles, ProxyException, UserAPIKeyAuth


async def check_key(request, api_key):
    if not secrets.compare_digest(api_key or "", os.environ["LITELLM_MASTER_KEY"]):
        raise ProxyException(message="invalid key", type="auth_error", param="key", code=401)
    return UserAPIKeyAuth(api_key=api_key, user_role=LitellmUserRoles.PROXY_ADMIN)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The proxy's API address; behind it stands the mini vision server."""
    program = need(SERVERS / "litellm" / "bin" / "litellm", HOW)
    folder = tmp_path_factory.mktemp("litellm")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "key_check.py").write_text(KEY_CHECK)
    mini, port = LocalServer(folder / "mini.log"), find_port()
    command = [program, "--config", folder / "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        # Files and batches go where OpenAI's own variables point, not where the model list does.
        "OPENAI_BASE_URL": mini.start(), "OPENAI_API_KEY": "none", "LITELLM_MASTER_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
        "LITELLM_TELEMETRY": "False", "LITELLM_MODE": "PRODUCTION", "NO_DOCS": "True",
    }  # fmt: skip
    try:
        ready = f"http://127.0.0.1:{port}/health/liveliness"
        with serving(command, ready=ready, log=folder / "log", seconds=180, **environment):
            yield f"http://127.0.0.1:{port}/v1"
    finally:
        mini.stop()


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOD_KEY", KEY)
    monkeypatch.setenv("BAD_KEY", "sk-of-somebody-else")


@pytest.mark.parametrize("color", ["red", "blue"])
def test_images_and_json_schemas_pass_through_the_proxy(url: str, tmp_path: Path, color: str) -> None:
    llm = make_llm(url, "mini-vision", tmp_path, api_key_variable="GOOD_KEY")
    assert ask_color(llm, color) == color
    assert llm.response_format("p") == "json_schema"
    assert llm.ledger.rows[-1].served_model == "mini-vision"


def test_a_mock_reply_of_the_proxy_is_parsed(url: str, tmp_path: Path) -> None:
    llm = make_llm(url, "canned", tmp_path, response_format="json_schema", api_key_variable="GOOD_KEY")
    assert ask_color(llm, "blue") == "red"


def test_a_model_that_ignores_every_response_format_raises_an_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="canned at .* supports no response format"):
        ask_color(make_llm(url, "canned", tmp_path, api_key_variable="GOOD_KEY"), "red")


def test_doctor_checks_images_and_streaming_through_the_proxy(url: str, tmp_path: Path) -> None:
    llm = make_llm(url, "mini-vision", tmp_path, api_key_variable="GOOD_KEY")
    found = {finding.name: finding for finding in examine(llm, "p")}
    assert {name for name, finding in found.items() if not finding.is_good} <= {"tools"}
    assert found["models"].detail == "listed, one of 2"


def test_a_rejected_key_raises_an_error_naming_its_variable(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refuses the key in BAD_KEY"):
        ask_color(make_llm(url, "mini-vision", tmp_path, api_key_variable="BAD_KEY"), "red")


def test_an_unknown_model_is_a_configuration_error(url: str, tmp_path: Path) -> None:
    llm = make_llm(url, "unheard-of", tmp_path, response_format="json_schema", api_key_variable="GOOD_KEY")
    with pytest.raises(ConfigError, match="Invalid model name passed in model=unheard-of"):
        ask_color(llm, "red")


def test_files_and_batches_pass_through_the_proxy(url: str, tmp_path: Path) -> None:
    llm = make_llm(url, "mini-vision", tmp_path, api_key_variable="GOOD_KEY")
    specs = {c: RequestSpec("You look.", ("Which color fills it?", fill_picture(c)), Seen) for c in ("red", "blue")}
    options = BatchOptions("batches", poll_seconds=0.2, max_wait_seconds=30)
    answers, failures = ask_batch(llm, specs, options, options=AskOptions("inspector"))
    assert failures == {}
    assert {name: answer.reply.color for name, answer in answers.items()} == {"red": "red", "blue": "blue"}
