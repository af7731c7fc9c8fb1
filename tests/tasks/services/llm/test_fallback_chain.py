"""Who is asked, in which order and way, and what it may cost; requests are counted at the servers."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import BudgetExceeded, ConfigError, ReplyInvalid
from tasks.services.llm.budget.ledger import Ledger, compute_cost
from tasks.services.llm.budget.spending_cap import Budget
from tasks.services.llm.chat.completion import Usage, parse_usage
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import CapabilityConfig, PriceConfig, ProfileConfig
from tasks.services.llm.service import LlmService
from tasks.services.store.local import LocalStore
from tests.support.config import make_llm_config
from tests.support.llm import CHAT, GOOD, REFUSAL, SPEC, Reply, two_profiles
from tests.support.llm_server import ScriptedServer, completion, scripted_server


@pytest.fixture
def cheap() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


@pytest.fixture
def strong() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("first", "reason"), [('{"grade": 9}', "does not fit"), (REFUSAL, "the model refused")])
def test_an_invalid_or_refused_reply_falls_back_to_the_next_profile(
    cheap: ScriptedServer, strong: ScriptedServer, tmp_path: Path, first: Any, reason: str
) -> None:
    cheap.script(first)
    strong.script(GOOD)
    answer = two_profiles(cheap, strong, tmp_path).ask(SPEC, role="judge")
    assert (answer.profile, answer.fallback_index) == ("strong", 1)
    assert reason in answer.reason
    assert (cheap.counts[CHAT], strong.counts[CHAT]) == (2, 1)  # once, once more with the reason, then on
    last = rows_of(tmp_path)[-1]
    assert (last["profile"], last["fallback_index"], last["outcome"]) == ("strong", 1, "ok")
    assert reason in last["reason"]


def test_a_repeated_request_after_a_fallback_is_not_paid_twice(
    cheap: ScriptedServer, strong: ScriptedServer, tmp_path: Path
) -> None:
    cheap.script(REFUSAL)
    strong.script(GOOD)
    for _ in range(2):
        assert two_profiles(cheap, strong, tmp_path).ask(SPEC, role="judge").profile == "strong"
    assert (cheap.counts[CHAT], strong.counts[CHAT]) == (2, 1)


def test_a_reply_that_should_escalate_goes_to_the_next_profile(
    cheap: ScriptedServer, strong: ScriptedServer, tmp_path: Path
) -> None:
    cheap.script('{"grade": 0}')
    strong.script(GOOD)
    llm = two_profiles(cheap, strong, tmp_path)
    answer = llm.ask(SPEC, role="judge", should_escalate=lambda r: "too low" if r.grade == 0 else None)
    assert (answer.profile, answer.reason) == ("strong", "too low")


def test_a_failed_escalation_returns_the_earlier_reply_with_the_reason(
    cheap: ScriptedServer, strong: ScriptedServer, tmp_path: Path
) -> None:
    cheap.script(GOOD)
    strong.script(REFUSAL)
    answer = two_profiles(cheap, strong, tmp_path).ask(SPEC, role="judge", should_escalate=lambda r: "never sure")
    assert answer.profile == "cheap"
    assert "refused" in answer.reason


def test_a_refusal_by_every_profile_raises_reply_invalid(
    cheap: ScriptedServer, strong: ScriptedServer, tmp_path: Path
) -> None:
    cheap.script(REFUSAL)
    strong.script(REFUSAL)
    with pytest.raises(ReplyInvalid, match="refused"):
        two_profiles(cheap, strong, tmp_path).ask(SPEC, role="judge")


class Speaking(ScriptedServer):
    """A server that understands one way of asking for a schema and ignores or refuses the others."""

    response_format = ""
    is_refusing = True

    def next_answer(self) -> Any:
        body = self.bodies[-1]
        kind = (body.get("response_format") or {}).get("type", "text")
        if kind == "json_object" and "schema" not in body["response_format"]:
            kind = "json_mode"
        if body.get("tool_choice"):
            kind = "tool"
        is_probe = "vermilion" in json.dumps(body)
        content = '{"color": "vermilion"}' if is_probe else GOOD
        if kind != self.response_format:
            if not self.is_refusing:
                return 200, {}, json.dumps(completion("Reddish, I would say.")).encode()
            return 500 if kind == "json_schema" else 400, {}, b'{"error": {"message": "what is this?"}}'
        whole = completion(f"Here you are: {content} Anything else?" if kind == "text" else content)
        if kind == "tool":
            function = {"name": "answer", "arguments": content}
            message = {"role": "assistant", "content": None, "refusal": None,
                       "tool_calls": [{"id": "t", "type": "function", "function": function}]}  # fmt: skip
            whole["choices"][0]["message"] = message
        return 200, {}, json.dumps(whole).encode()


@pytest.mark.parametrize("is_refusing", [True, False])
@pytest.mark.parametrize(
    ("response_format", "tries"), [("json_schema", 1), ("json_object", 2), ("tool", 3), ("json_mode", 4), ("text", 5)]
)
def test_the_response_format_is_probed_once(
    tmp_path: Path, response_format: str, tries: int, is_refusing: bool
) -> None:
    speaking = Speaking()
    speaking.response_format, speaking.is_refusing = response_format, is_refusing
    with scripted_server(speaking) as server:
        profile = ProfileConfig(base_url=server.url, model="asked-model", max_attempts=1)
        config = make_llm_config(models=("p",), profiles={"p": profile})
        for number in range(2):
            llm = LlmService(config, store=LocalStore(tmp_path / "store"), ledger=Ledger(tmp_path / "ledger.jsonl"))
            spec = RequestSpec("be brief", (f"grade sample {number}",), Reply)
            assert llm.ask(spec, role="judge").reply.grade == 2
        assert llm.response_format("p") == response_format
        assert server.counts[CHAT] == tries + 2


def test_a_server_without_any_response_format_is_named_in_the_error(tmp_path: Path) -> None:
    speaking = Speaking()
    with scripted_server(speaking) as server:
        profile = ProfileConfig(base_url=server.url, model="asked-model", max_attempts=1)
        config = make_llm_config(models=("p",), profiles={"p": profile})
        llm = LlmService(config, store=LocalStore(tmp_path / "store"), ledger=Ledger(tmp_path / "ledger.jsonl"))
        with pytest.raises(ConfigError, match="asked-model at .* supports no response format: json_schema: .*500"):
            llm.ask(SPEC, role="judge")


def test_a_reply_of_another_model_is_priced_as_that_model_and_not_comparable(
    cheap: ScriptedServer, strong: ScriptedServer, tmp_path: Path
) -> None:
    cheap.script((200, {}, json.dumps(completion(GOOD, model="dear-model")).encode()))
    llm = two_profiles(cheap, strong, tmp_path)
    answer = llm.ask(SPEC, role="judge")
    assert not llm.is_comparable(answer)
    assert llm.ledger.sum_cost() is None  # nobody here knows its price
    dear = llm.config.profiles["strong"].model_copy(
        update={"model": "dear-model", "prices": PriceConfig(input=5, output=50, date="d")}
    )
    llm.config.profiles["strong"] = dear
    again = replace(SPEC, repeat=1)
    llm.ask(again, role="judge")
    assert llm.ledger.rows[-1].cost_usd == pytest.approx((100 * 5 + 20 * 50) / 1e6)


def test_usage_is_parsed_in_the_format_of_every_provider() -> None:
    usage = {
        "prompt_tokens": 100, "completion_tokens": 30, "cost_in_usd_ticks": 37_500,
        "prompt_tokens_details": {"cached_tokens": 60, "image_tokens": 25},
        "completion_tokens_details": {"reasoning_tokens": 10},
    }  # fmt: skip
    assert parse_usage(usage) == (Usage(100, 60, 25, 30, 10, 37_500 / 1e10), "")
    assert parse_usage({"cost": 0.5}) == (Usage(reported_usd=0.5), "")
    assert parse_usage({}) == parse_usage(None) == (Usage(), "no usage was reported")


def test_cost_applies_cache_and_batch_prices_and_prefers_the_reported_cost() -> None:
    prices = PriceConfig(input=1.0, cached_input=0.1, output=10.0, batch_discount=0.5, date="day")
    usage = Usage(input_tokens=100, cached_tokens=60, output_tokens=30)
    whole = (40 * 1.0 + 60 * 0.1 + 30 * 10.0) / 1e6
    assert compute_cost(prices, usage, is_batch=False) == (pytest.approx(whole), "day")
    assert compute_cost(prices, usage, is_batch=True) == (pytest.approx(whole / 2), "day")
    assert compute_cost(prices, replace(usage, reported_usd=0.7), is_batch=True) == (0.7, "reported")
    assert compute_cost(None, usage, is_batch=False) == (None, "")


def test_eight_workers_with_budget_for_three_requests_send_three(cheap: ScriptedServer, tmp_path: Path) -> None:
    fixed = CapabilityConfig(response_format="json_schema")
    # Nothing goes in for money, so that the worst case is the maximum tokens of a reply alone: 600 tokens.
    prices = PriceConfig(input=0.0, output=1000.0, date="d")
    profile = ProfileConfig(base_url=cheap.url, model="asked-model", capabilities=fixed, prices=prices, max_attempts=1)
    config = make_llm_config(models=("p",), profiles={"p": profile}, budget_usd=1.8)
    cheap.script((200, {}, json.dumps(completion(GOOD, usage={"prompt_tokens": 1, "completion_tokens": 600})).encode()))

    def work(number: int) -> str:
        budget = Budget(tmp_path / "budget.json", config.budget_usd)
        store, ledger = LocalStore(tmp_path / "store"), Ledger(tmp_path / f"ledger-{number}.jsonl")
        llm = LlmService(config, store=store, ledger=ledger, budget=budget)
        try:
            llm.ask(replace(SPEC, repeat=number), role="judge")
        except BudgetExceeded:
            return "stopped"
        return "answered"

    with ThreadPoolExecutor(8) as pool:
        outcomes = sorted(pool.map(work, range(8)))
    assert outcomes == ["answered"] * 3 + ["stopped"] * 5
    assert cheap.counts[CHAT] == 3
    # A later process knows; what is answered costs nothing again.
    assert work(99) == "stopped"
    done = next(
        n
        for n in range(8)
        if (tmp_path / f"ledger-{n}.jsonl").exists() and "ok" in (tmp_path / f"ledger-{n}.jsonl").read_text()
    )
    assert work(done) == "answered"
    assert cheap.counts[CHAT] == 3


def test_the_unused_part_of_a_reservation_is_released(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget.json", 1.0)
    name = budget.reserve(0.9)
    with pytest.raises(BudgetExceeded, match=r"0.9000 of 1.0000 USD .* raise llm.budget_usd"):
        budget.reserve(0.2)
    budget.reconcile(name, spent=0.1)
    assert Budget(tmp_path / "budget.json", 1.0).reserve(0.9)


def test_a_spending_cap_without_prices_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"budget_usd needs prices: set llm.profiles.p.prices"):
        make_llm_config(models=("p",), profiles={"p": ProfileConfig(base_url="http://x", model="m")}, budget_usd=1.0)
