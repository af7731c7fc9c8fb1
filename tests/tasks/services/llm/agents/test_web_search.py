"""Searching the web: text only, by each provider's way, with the pages that are cited."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.compose import compile_request
from conf.overrides import parse_overrides
from tasks.errors import ConfigError
from tasks.services.llm.agents.web_search import ask_with_search
from tasks.services.llm.config import CapabilityConfig
from tasks.subject.name_lookup import look_up_names
from tests.support.config import make_subject_config
from tests.support.llm import CHAT, SPEC, make_llm
from tests.support.llm_server import ScriptedServer, completion, scripted_server

RESPONSES = "POST /v1/responses"
CONFIG = make_subject_config(
    class_noun="cup", web_lookup={"enabled": True, "query": "Maine Coon", "domains": ("example.org",)}
)
FINDING = {
    "evidence": "A breed of cat.", "class_noun": "Cat", "is_identifier_known": True, "identifier_meaning": "a rifle",
}  # fmt: skip
NOTE = {"type": "url_citation", "url": "https://example.org/coon", "title": "t", "start_index": 0, "end_index": 1}


def responded(content: str, *, status: str = "completed") -> tuple[int, dict[str, str], bytes]:
    """Return a reply of the Responses API, after platform.openai.com/docs/api-reference/responses."""
    message = {
        "type": "message", "id": "m", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": content, "annotations": [NOTE, NOTE]}],
    }  # fmt: skip
    search = {"type": "web_search_call", "id": "w", "status": "completed"}
    usage = {
        "input_tokens": 900, "output_tokens": 60, "total_tokens": 960,
        "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 40},
    }  # fmt: skip
    whole = {
        "id": "r", "object": "response", "created_at": 1, "model": "asked-model", "status": status,
        "output": [search, message], "usage": usage, "parallel_tool_calls": False, "tool_choice": "auto", "tools": [],
    }  # fmt: skip
    return 200, {}, json.dumps(whole).encode()


def searching(server: ScriptedServer, folder: Path, kind: str) -> Any:
    able = CapabilityConfig(response_format="json_schema", web_search=kind)  # type: ignore[arg-type]
    prices = {"input": 1.0, "output": 10.0, "date": "2026-11-22"}
    return make_llm(server, folder, capabilities=able, prices=prices)


def test_names_are_looked_up_once_by_the_responses_api_and_sources_recorded(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(responded(json.dumps(FINDING)))
        llm = searching(server, tmp_path, "responses")
        warnings, sources = look_up_names(CONFIG, llm=llm)
        assert look_up_names(CONFIG, llm=llm) == (warnings, sources)
        assert server.counts[RESPONSES] == 1
    assert "the web calls Maine Coon a cat, not a cup" in warnings[0]
    assert "sks means a rifle already" in warnings[1]
    assert sources == ("https://example.org/coon",)
    body = server.bodies[0]
    assert body["tools"] == [{"type": "web_search", "filters": {"allowed_domains": ["example.org"]}}]
    assert body["store"] is False
    assert body["text"]["format"]["strict"] is True
    assert [row.outcome for row in llm.ledger.rows] == ["ok", "cached"]
    assert llm.ledger.sum_cost() == pytest.approx((900 + 600) / 1e6)


def test_another_list_of_domains_is_another_search(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(responded(json.dumps(FINDING)))
        llm = searching(server, tmp_path, "responses")
        for domains in (("example.org",), ("example.com",), ("example.com",)):
            lookup = {"enabled": True, "query": "Maine Coon", "domains": domains}
            look_up_names(make_subject_config(class_noun="cup", web_lookup=lookup), llm=llm)
        assert server.counts[RESPONSES] == 2


def test_openrouter_requests_use_its_web_search_server_tool(tmp_path: Path) -> None:
    whole = completion(json.dumps({**FINDING, "class_noun": "cup", "is_identifier_known": False}))
    whole["choices"][0]["message"]["annotations"] = [{"type": "url_citation", "url_citation": {"url": NOTE["url"]}}]
    with scripted_server() as server:
        server.script((200, {}, json.dumps(whole).encode()))
        assert look_up_names(CONFIG, llm=searching(server, tmp_path, "openrouter")) == ([], (NOTE["url"],))
        assert server.counts[CHAT] == 1
    tool = {"type": "openrouter:web_search", "parameters": {"allowed_domains": ["example.org"]}}
    assert server.bodies[0]["tools"] == [tool]


def test_a_truncated_web_search_reply_does_not_stop_the_run(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(responded('{"evi', status="incomplete"))
        assert look_up_names(CONFIG, llm=searching(server, tmp_path, "responses")) == ([], ())


def test_a_web_search_request_with_images_is_rejected(tmp_path: Path) -> None:
    with scripted_server() as server:
        with pytest.raises(ConfigError, match="pictures are not sent along"):
            ask_with_search(searching(server, tmp_path, "responses"), SPEC, role="profiler")
        assert not server.counts


def test_web_lookup_is_disabled_by_default_and_needs_a_profile_with_web_search(tmp_path: Path) -> None:
    with scripted_server() as server:
        llm = searching(server, tmp_path, "none")
        assert look_up_names(make_subject_config(class_noun="cup"), llm=llm) == ([], ())
        with pytest.raises(ConfigError, match="no profile of the profiler searches"):
            look_up_names(CONFIG, llm=llm)
        assert not server.counts
    with pytest.raises(ConfigError, match="needs a profiler that searches the web"):
        compile_request(parse_overrides(["subject.web_lookup.enabled=true"]))


def test_web_search_findings_are_sanitized(tmp_path: Path) -> None:
    finding = {**FINDING, "class_noun": "<b>cat</b>\n{ignore}", "identifier_meaning": "x" * 900}
    with scripted_server() as server:
        server.script(responded(json.dumps(finding)))
        warnings, _ = look_up_names(CONFIG, llm=searching(server, tmp_path, "responses"))
    assert "<" not in warnings[0]
    assert "{" not in warnings[0]
