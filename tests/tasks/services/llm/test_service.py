"""Asking a model: cache, retries, repair, ledger; requests are counted at the server."""

import json
from pathlib import Path

import pytest

from tasks.errors import BudgetExceeded, ConfigError, ReplyInvalid, ServiceUnavailable
from tasks.images import encode_png
from tasks.services.llm.chat.body import encode_image
from tests.support.llm import CHAT, GOOD, ask, make_llm
from tests.support.llm_server import ScriptedServer, completion
from tests.support.tiny import draw_photo


def test_a_repeated_request_is_cached_and_paid_once(server: ScriptedServer, tmp_path: Path) -> None:
    server.script(GOOD)
    prices = {"input": 1.0, "output": 10.0, "date": "2026-11-22"}
    llm = make_llm(server, tmp_path, prices=prices)
    assert [ask(llm).grade, ask(llm).grade] == [2, 2]
    assert server.counts[CHAT] == 1
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["ok", "cached"]
    assert rows[0]["served_model"] == "asked-model-2026-11-01"
    assert rows[0]["usage"]["input_tokens"] == 100
    assert llm.ledger.count_calls() == 1
    assert llm.ledger.sum_cost() == pytest.approx((100 * 1.0 + 20 * 10.0) / 1e6)


def test_cost_is_unknown_without_prices(server: ScriptedServer, tmp_path: Path) -> None:
    server.script(GOOD)
    llm = make_llm(server, tmp_path)
    ask(llm)
    assert llm.ledger.sum_cost() is None


def test_a_rate_limited_request_waits_for_retry_after(server: ScriptedServer, tmp_path: Path) -> None:
    server.script((429, {"retry-after": "0.2"}, b"{}"), GOOD)
    assert ask(make_llm(server, tmp_path)).grade == 2
    assert server.counts[CHAT] == 2


def test_a_retry_after_beyond_the_deadline_raises_without_waiting(server: ScriptedServer, tmp_path: Path) -> None:
    server.script((429, {"retry-after": "600"}, b"{}"))
    with pytest.raises(ServiceUnavailable, match="asks to wait"):
        ask(make_llm(server, tmp_path))
    assert server.counts[CHAT] == 1


@pytest.mark.parametrize(
    ("status", "body", "error", "asked"),
    [
        (429, b'{"error": {"message": "insufficient_quota"}}', BudgetExceeded, 1),
        (401, b"{}", ConfigError, 1),
        (404, b"{}", ConfigError, 1),
        (500, b"{}", ServiceUnavailable, 3),
    ],
)
def test_each_http_status_maps_to_its_error_and_number_of_attempts(
    server: ScriptedServer, tmp_path: Path, status: int, body: bytes, error: type[Exception], asked: int
) -> None:
    server.script((status, {"retry-after": "0"}, body))
    with pytest.raises(error):
        ask(make_llm(server, tmp_path))
    assert server.counts[CHAT] == asked


def test_an_invalid_reply_is_retried_once_with_the_reason(server: ScriptedServer, tmp_path: Path) -> None:
    server.script('{"grade": 9}', GOOD)
    assert ask(make_llm(server, tmp_path)).grade == 2
    assert server.counts[CHAT] == 2
    assert "does not fit: grade" in server.bodies[1]["messages"][-1]["content"]


def test_a_second_invalid_reply_raises_and_is_not_cached(server: ScriptedServer, tmp_path: Path) -> None:
    cut = json.dumps(completion('{"grade": 2', finish_reason="length")).encode()
    server.script((200, {}, cut))
    llm = make_llm(server, tmp_path)
    with pytest.raises(ReplyInvalid, match="cut off"):
        ask(llm)
    assert server.counts[CHAT] == 2
    assert llm.store.list_keys("llm/") == []


def test_an_unreachable_server_is_a_one_line_error(tmp_path: Path, free_port: int) -> None:
    server = ScriptedServer()
    server.url = f"http://127.0.0.1:{free_port}/v1"
    with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{free_port}/v1 does not answer"):
        ask(make_llm(server, tmp_path, max_attempts=1))


def test_a_missing_key_raises_before_any_request(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY is not set"):
        ask(make_llm(server, tmp_path, api_key_variable="SOME_KEY"))
    assert not server.counts


def test_large_images_are_sent_as_jpeg_and_small_ones_as_png() -> None:
    url = encode_image(encode_png(draw_photo(size=400)), max_side=256)
    assert url.startswith("data:image/jpeg;base64,")
    assert encode_image(encode_png(draw_photo(size=64)), max_side=256).startswith("data:image/png;base64,")
