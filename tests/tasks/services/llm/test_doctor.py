"""What `likeness doctor` and the estimate say of profiles, before anything is paid for."""

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.compose import compile_request
from conf.overrides import parse_overrides
from flows.cli.spending.cost import read_ledger, sum_costs
from flows.cli.spending.estimate import print_estimates
from tasks.mini.vision_server.launch import LocalServer
from tasks.services.llm.budget.cost_estimate import PlannedRequests, estimate_calls
from tasks.services.llm.budget.ledger import Ledger
from tasks.services.llm.config import CapabilityConfig, PriceConfig, ProfileConfig
from tasks.services.llm.doctor import check_retirement, examine
from tasks.services.llm.executor import AskOptions, ask_each
from tasks.services.llm.service import LlmService, LocalServices
from tasks.services.store.local import LocalStore
from tests.support.llm import GOOD, SPEC, ask, make_llm, two_profiles
from tests.support.llm_server import ScriptedServer, completion, scripted_server

TODAY = datetime.date(2026, 11, 22)


class Listing(ScriptedServer):
    """Lists its models; sees red, unless it is another model that answers."""

    def __init__(self, **reply: Any) -> None:
        super().__init__()
        self.reply = reply

    def next_answer(self) -> Any:
        content = '{"color": "vermilion"}' if "vermilion" in json.dumps(self.bodies[-1]) else '{"color": "red"}'
        return 200, {}, json.dumps(completion(content, **{"model": "asked-model", **self.reply})).encode()


@pytest.mark.parametrize(
    ("retired_on", "is_good", "detail"),
    [
        (None, True, "none announced"),
        (datetime.date(2026, 10, 23), False, "was retired on 2026-10-23"),
        (datetime.date(2026, 12, 1), False, "in 9 days"),
        (datetime.date(2027, 4, 14), True, "on 2027-04-14"),
    ],
)
def test_an_upcoming_model_retirement_is_reported(retired_on: datetime.date | None, is_good: bool, detail: str) -> None:
    found = check_retirement(ProfileConfig(model="m", retired_on=retired_on), today=TODAY)
    assert found.is_good is is_good
    assert detail in found.detail


def test_a_missing_key_stops_doctor_before_any_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with scripted_server() as server:
        findings = list(examine(make_llm(server, tmp_path, api_key_variable="SOME_KEY"), "p"))
        assert not server.counts
    assert [(finding.name, finding.is_good) for finding in findings] == [("retirement", True), ("key", False)]


def test_the_mini_server_supports_all_capabilities_of_its_profile(tmp_path: Path) -> None:
    config = compile_request(parse_overrides([])).llm
    local = LocalServer(tmp_path / "log")
    llm = LlmService(
        config,
        store=LocalStore(tmp_path / "store"),
        ledger=Ledger(tmp_path / "l.jsonl"),
        local=LocalServices(start_server=local.start),
    )
    try:
        found = {finding.name: finding for finding in examine(llm, "local")}
    finally:
        llm.close()
        local.stop()
    assert all(finding.is_good for finding in found.values()), found
    assert set(found) == {"retirement", "key", "models", "response format", "images", "tools", "stream", "batch"}
    assert found["stream"].detail.endswith(" characters")


def findings(
    folder: Path, able: CapabilityConfig, *, models: list[dict[str, Any]] | None = None, **reply: Any
) -> dict[str, Any]:
    """Return what is found of a server that always gives one reply."""
    listing = Listing(**reply)
    listing.models = listing.models if models is None else models
    with scripted_server(listing) as server:
        return {found.name: found for found in examine(make_llm(server, folder, capabilities=able), "p")}


PLAIN = CapabilityConfig(response_format="json_schema", tools=False, streaming=False)


@pytest.mark.parametrize(("served", "is_good"), [("asked-model", True), ("dear-model", False)])
def test_doctor_tests_images_and_reports_a_different_served_model(tmp_path: Path, served: str, is_good: bool) -> None:
    found = findings(tmp_path, PLAIN, model=served)
    assert found["images"].is_good is is_good
    assert served in found["images"].detail


@pytest.mark.parametrize(
    ("model", "is_good", "detail"),
    [
        ({"id": "asked-model"}, True, "listed, one of 1"),
        ({"id": "new-model"}, False, "asked-model is not listed; listed: new-model"),
        ({"id": "asked-model", "shutdown_date": "2027-01-31"}, False, "to be shut down on 2027-01-31"),
    ],
)
def test_doctor_checks_the_model_against_the_model_list_of_the_provider(
    tmp_path: Path, model: dict[str, Any], is_good: bool, detail: str
) -> None:
    found = findings(tmp_path, PLAIN, models=[{"object": "model", "created": 1, "owned_by": "x", **model}])
    assert (found["models"].is_good, detail in found["models"].detail) == (is_good, True)


def test_an_unsupported_capability_is_reported_with_the_setting_to_change(tmp_path: Path) -> None:
    able = CapabilityConfig(response_format="json_schema", reasoning="effort")
    usage = {
        "prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18,
        "completion_tokens_details": {"reasoning_tokens": 7},
    }  # fmt: skip
    found = findings(tmp_path, able, usage=usage)
    assert found["response format"].is_good
    told = {name: found[name].detail for name in ("tools", "reasoning", "stream") if not found[name].is_good}
    assert told["tools"] == "calls no tool; set .capabilities.tools=false"
    assert told["reasoning"] == "reasons (7 tokens) although reasoning is disabled; set .capabilities.reasoning"
    assert told["stream"] == "no text was streamed; set .capabilities.streaming=false"


@pytest.mark.parametrize("kind", ["openai", "xai"])
def test_a_provider_without_batch_jobs_is_reported(tmp_path: Path, kind: Any) -> None:
    with scripted_server(Listing()) as server:
        server.batch_api = None  # type: ignore[assignment]
        llm = make_llm(server, tmp_path, capabilities=PLAIN.model_copy(update={"batch": kind}))
        found = {finding.name: finding for finding in examine(llm, "p")}
    assert found["batch"].detail == "has no batch API; set .capabilities.batch=none, or local"


def test_costs_are_summed_by_role_and_unknown_without_prices(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        llm = make_llm(server, tmp_path)
        ask(llm)
        ask(llm)
    [row] = sum_costs(read_ledger(tmp_path)[0])
    assert (row.calls, row.cached_replies, row.input_tokens, row.cost_usd) == (1, 1, 100, None)


def test_an_estimate_counts_requests_and_applies_the_batch_discount(tmp_path: Path) -> None:
    with scripted_server() as server:
        prices = {"input": 1.0, "output": 10.0, "batch_discount": 0.5, "date": "d"}
        config = make_llm(server, tmp_path, prices=prices).config
        whole, half = (
            estimate_calls(config, PlannedRequests("judge", [SPEC] * 3, is_batch=is_batch))
            for is_batch in (False, True)
        )
        assert not server.counts
    assert whole.calls == 3
    assert whole.expected_usd == pytest.approx((whole.input_tokens * 1.0 + 3 * 120 * 10.0) / 1e6)
    assert half.expected_usd == pytest.approx((whole.expected_usd or 0) / 2)
    assert whole.worst_calls == 3 * (3 + 1)  # three attempts for each question, and for the one that is repaired


class Spendthrift(ScriptedServer):
    """Cuts every reply but the last attempt's, which doesn't fit; claims as many tokens as were allowed."""

    def __init__(self, max_attempts: int) -> None:
        super().__init__()
        self.max_attempts = max_attempts

    def next_answer(self) -> Any:
        usage = {"prompt_tokens": 300, "completion_tokens": 600}
        whole = json.dumps(completion('{"grade": 9}', usage=usage)).encode()
        return 200, {}, whole if self.counts["POST /v1/chat/completions"] % self.max_attempts == 0 else whole[:99]


def test_the_worst_case_estimate_bounds_the_recorded_cost(tmp_path: Path) -> None:
    prices = PriceConfig(input=1.0, output=10.0, date="d")
    with scripted_server(Spendthrift(2)) as server, scripted_server(Spendthrift(2)) as strong:
        llm = two_profiles(server, strong, tmp_path, max_attempts=2, prices=prices, concurrency=1)
        specs = {f"s{number}": replace(SPEC, repeat=number) for number in range(4)}
        estimate = estimate_calls(llm.config, PlannedRequests("judge", list(specs.values())))
        answers, failures = ask_each(llm, specs, AskOptions("judge"))
        calls = server.counts["POST /v1/chat/completions"] + strong.counts["POST /v1/chat/completions"]
    assert (len(answers), len(failures)) == (0, 4)
    spent = llm.ledger.sum_cost() or 0.0
    assert (estimate.expected_usd or 0.0) < spent <= (estimate.worst_usd or 0.0)
    assert calls <= estimate.worst_calls


def test_an_estimate_includes_conditional_requests(capsys: pytest.CaptureFixture[str]) -> None:
    print_estimates(["llm=openai", "scoring=sync", "subject.source=photos", "subject.class_noun=mug", "diffusion=mini"])
    shown = capsys.readouterr().out
    assert "adjudicator" in shown
    expected, worst = (
        float(next(line for line in shown.splitlines() if line.startswith(word)).split()[number])
        for word, number in (("expected", 1), ("at most", 2))
    )
    assert 0 < expected < worst
