"""aimock, a mock of OpenAI that others wrote: its replies, its faults, its keys, its files and batches."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import BudgetExceeded, ConfigError, ReplyInvalid, ServiceUnavailable
from tasks.services.llm.batch.jobs import BatchOptions, ask_batch
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.doctor import examine
from tasks.services.llm.executor import AskOptions
from tasks.services.llm.service import LlmService
from tests.servers.served import SERVERS, Seen, ask_color, fill_picture, find_port, make_llm, need, serving

HOW = "make test-llm-servers"
RED, GREEN = {"content": {"color": "red"}}, {"content": {"color": "green"}}
LIMIT = {"message": "slow down", "type": "rate_limit_error"}
NO_MONEY = {"message": "pay first", "type": "insufficient_quota", "code": "insufficient_quota"}


def reply(said: str, response: dict[str, Any], *, match: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """Return a fixture: what is answered where the user's last message holds these words."""
    return {"match": {"userMessage": said, **(match or {})}, "response": response, **others}


# The first that fits answers; a `sequenceIndex` fits once.
FIXTURES = [
    reply("two colors", {"content": {"color": "vermilion"}}, match={"responseFormat": "json_schema"}),
    reply("cut", {"content": '{"color": "re', "finishReason": "length"}),  # so is the second try, which quotes it
    reply("could not be used", GREEN),
    reply("busy once", {"error": LIMIT, "status": 429, "retryAfter": 1}, match={"sequenceIndex": 0}),
    reply("busy once", RED),
    reply("busy for long", {"error": LIMIT, "status": 429, "retryAfter": 600}),
    reply("no money", {"error": NO_MONEY, "status": 429}),
    reply("broken once", RED, match={"sequenceIndex": 0}, chaos={"disconnectRate": 1}),
    reply("broken once", RED),
    reply("broken", RED, chaos={"disconnectRate": 1}),
    reply("garbled", RED, chaos={"malformedRate": 1}),
    reply("dropped", RED, chaos={"dropRate": 1}),
    reply("filtered", {"content": "no", "finishReason": "content_filter"}),
    reply("unfitting", {"content": {"color": "mauve"}}),
    reply("thoughtful", {**RED, "reasoning": "It looks red to me."}),
    reply("", {"toolCalls": [{"name": "answer", "arguments": {"color": "blue"}}]}, match={"toolName": "answer"}),
    reply("Say hello", {"content": "Hello there, in pieces."}, match={"model": "gpt-made-up"}, chunkSize=5),
    reply("color fills", RED, match={"responseFormat": "json_schema"}),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The mock's API address."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not there; install it")
    program = need(SERVERS / "aimock/node_modules/@copilotkit/aimock/dist/cli.js", HOW)
    folder, port = tmp_path_factory.mktemp("aimock"), find_port()
    (folder / "fixtures.json").write_text(json.dumps({"fixtures": FIXTURES}))
    command = [node, program, "--host", "127.0.0.1", "--port", str(port), "--fixtures", folder / "fixtures.json"]
    strictly = [*command, "--strict", "--validate-on-load"]
    address = f"http://127.0.0.1:{port}"
    with serving(strictly, ready=f"{address}/ready", log=folder / "log", seconds=30, AIMOCK_API_KEYS="sk-good"):
        yield f"{address}/v1"


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOD_KEY", "sk-good")
    monkeypatch.setenv("BAD_KEY", "sk-bad")


def make(url: str, folder: Path, **changes: Any) -> LlmService:
    """Return a service that knows the key and tries twice."""
    fixed = {"response_format": "json_schema", "api_key_variable": "GOOD_KEY", "max_attempts": 2, "timeout_seconds": 20}
    return make_llm(url, "gpt-made-up", folder, **{**fixed, **changes})


def outcomes(llm: LlmService) -> list[str]:
    return [row.outcome for row in llm.ledger.rows]


def test_the_response_format_is_probed_before_an_image_request(url: str, tmp_path: Path) -> None:
    llm = make(url, tmp_path, response_format="auto")
    assert ask_color(llm, "red") == "red"
    assert (llm.response_format("p"), outcomes(llm)) == ("json_schema", ["ok", "ok"])


def test_a_tool_call_reply_is_parsed(url: str, tmp_path: Path) -> None:
    assert ask_color(make(url, tmp_path, response_format="tool"), "blue") == "blue"


def test_a_rate_limited_request_waits_for_retry_after(url: str, tmp_path: Path) -> None:
    llm, started = make(url, tmp_path), time.monotonic()
    assert ask_color(llm, "red", text="busy once") == "red"
    assert outcomes(llm) == ["ServiceUnavailable", "ok"]
    assert 1.0 <= time.monotonic() - started < 10


def test_a_broken_connection_is_retried(url: str, tmp_path: Path) -> None:
    llm = make(url, tmp_path)
    assert ask_color(llm, "red", text="broken once") == "red"
    assert outcomes(llm) == ["ServiceUnavailable", "ok"]


@pytest.mark.parametrize(
    ("said", "error", "message", "calls"),
    [
        ("busy for long", ServiceUnavailable, "asks to wait", 1),
        ("no money", BudgetExceeded, "quota .* is used up", 1),
        ("broken", ServiceUnavailable, "does not answer", 2),
        ("garbled", ServiceUnavailable, "is no JSON: b'{malformed", 2),
        ("dropped", ServiceUnavailable, "answered 500", 2),
        ("nobody foresaw this", ServiceUnavailable, "answered 503", 2),
        ("cut", ReplyInvalid, "cut off", 2),
    ],
)
def test_each_server_fault_maps_to_its_error_and_number_of_attempts(
    url: str, tmp_path: Path, said: str, error: Any, message: str, calls: int
) -> None:
    llm = make(url, tmp_path)
    with pytest.raises(error, match=message):
        ask_color(llm, "red", text=said)
    assert len(outcomes(llm)) == calls


@pytest.mark.parametrize("said", ["unfitting", "filtered"])
def test_an_invalid_reply_is_retried_with_the_reason(url: str, tmp_path: Path, said: str) -> None:
    llm = make(url, tmp_path)
    assert ask_color(llm, "red", text=said) == "green"
    assert outcomes(llm) == ["invalid", "ok"]


def test_the_reasoning_of_a_reply_is_returned(url: str, tmp_path: Path) -> None:
    spec = RequestSpec("", ("thoughtful", fill_picture("red")), Seen)
    assert make(url, tmp_path).ask(spec, role="inspector").reasoning == "It looks red to me."


def test_a_rejected_key_raises_an_error_naming_its_variable(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refuses the key in BAD_KEY"):
        ask_color(make(url, tmp_path, api_key_variable="BAD_KEY"), "red")


def test_doctor_reports_no_problem(url: str, tmp_path: Path) -> None:
    assert [
        finding for finding in examine(make(url, tmp_path, response_format="auto"), "p") if not finding.is_good
    ] == []


def test_a_batch_job_completes_and_every_row_is_matched_by_custom_id(url: str, tmp_path: Path) -> None:
    specs = {str(n): RequestSpec("", (f"sample {n}",), Seen) for n in range(3)}
    seen: list[tuple[int, int]] = []
    llm = make(url, tmp_path)
    options = BatchOptions("batches", poll_seconds=0.05, max_wait_seconds=20)
    answers, failures = ask_batch(
        llm, specs, options, options=AskOptions("inspector", on_progress=lambda done, total: seen.append((done, total)))
    )
    # Its rows all say the same, which is no JSON: every one comes back by its name, and none is kept.
    assert answers == {}
    assert failures == dict.fromkeys(specs, "the reply is not JSON: 'Mock batch completion'")
    assert seen[-1] == (3, 3)
    batches = llm.client("p").batches.list().data
    assert [(batch.status, batch.request_counts.completed) for batch in batches] == [("completed", 3)]
