"""Money: reserved for each attempt, reconciled by usage that is possible, never freed by damage."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import BudgetExceeded, ConfigError, LikenessError, ServiceUnavailable
from tasks.services.llm.batch.jobs import BatchOptions, ask_batch
from tasks.services.llm.budget.spending_cap import Budget
from tasks.services.llm.executor import AskOptions
from tasks.services.llm.service import LlmService, LocalServices
from tests.support.llm import CHAT, GOOD, SPEC, WHOLE, ask, make_llm
from tests.support.llm_server import ScriptedServer, completion

# Input is free, so that one attempt's worst case is the maximum tokens of a reply alone: 600 tokens.
PRICES = {"input": 0.0, "output": 1000.0, "date": "2026-11-22"}
ATTEMPT = 0.6


def make_paying(server: ScriptedServer, folder: Path, *, cap: float, **changes: Any) -> LlmService:
    llm = make_llm(server, folder, **{"prices": PRICES, **changes})
    llm.budget = Budget(folder / "budget.json", cap)
    return llm


def committed(folder: Path) -> float:
    state = json.loads((folder / "budget.json").read_text())
    return float(state["spent_usd"] + sum(state["reserved"].values()))


@pytest.mark.parametrize("body", [WHOLE[: len(WHOLE) // 2], b"<html>", b"[]"], ids=["cut", "no JSON", "no object"])
def test_each_attempt_that_may_be_billed_is_reserved(server: ScriptedServer, tmp_path: Path, body: bytes) -> None:
    server.script((200, {}, body))
    llm = make_paying(server, tmp_path, cap=3 * ATTEMPT, max_attempts=10, timeout_seconds=60)
    with pytest.raises(BudgetExceeded):
        ask(llm)
    assert server.counts[CHAT] == 3
    assert committed(tmp_path) == pytest.approx(3 * ATTEMPT)
    assert llm.ledger.sum_cost() == pytest.approx(3 * ATTEMPT)
    assert all(row.usage_fault for row in llm.ledger.rows)


@pytest.mark.parametrize(("status", "num_kept"), [(400, 0), (401, 0), (403, 0), (404, 0), (429, 0), (500, 1)])
def test_a_4xx_reply_releases_the_reservation_and_a_5xx_reply_does_not(
    server: ScriptedServer, tmp_path: Path, status: int, num_kept: int
) -> None:
    server.script((status, {}, b"{}"))
    with pytest.raises(LikenessError):
        ask(make_paying(server, tmp_path, cap=10.0, max_attempts=1))
    assert committed(tmp_path) == pytest.approx(num_kept * ATTEMPT)


def test_a_failed_connection_releases_the_reservation(tmp_path: Path, free_port: int) -> None:
    server = ScriptedServer()
    server.url = f"http://127.0.0.1:{free_port}/v1"
    with pytest.raises(ServiceUnavailable):
        ask(make_paying(server, tmp_path, cap=10.0, max_attempts=2))
    assert committed(tmp_path) == 0.0


def test_a_missing_key_reserves_nothing(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError):
        ask(make_paying(server, tmp_path, cap=10.0, api_key_variable="SOME_KEY"))
    assert not (tmp_path / "budget.json").exists()


BAD_USAGE: dict[str, Any] = {
    "missing": None,
    "empty": {},
    "negative": {"prompt_tokens": 100, "completion_tokens": -20},
    "text": {"prompt_tokens": 100, "completion_tokens": "20"},
    "a boolean": {"prompt_tokens": 100, "completion_tokens": True},
    "a fraction": {"prompt_tokens": 100, "completion_tokens": 2.5},
    "a list": [100, 20],
    "of no input": {"prompt_tokens": 0, "completion_tokens": 20},
    "of no output": {"prompt_tokens": 100, "completion_tokens": 0},
    "of far too much output": {"prompt_tokens": 100, "completion_tokens": 900_000},
    "of far too much input": {"prompt_tokens": 900_000_000, "completion_tokens": 20},
    "of more cached than sent": {
        "prompt_tokens": 10, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 900},
    },
    "of a negative cost": {"prompt_tokens": 100, "completion_tokens": 20, "cost": -5},
    "of a cost in words": {"prompt_tokens": 100, "completion_tokens": 20, "cost": "free"},
    "of an absurd cost": {"prompt_tokens": 100, "completion_tokens": 20, "cost": 1e6},
}  # fmt: skip
NOT_JSON = {"of infinity": b"Infinity", "of NaN": b"NaN", "beyond a float": b"1e999", "of 400 digits": b"9" * 400}


def with_usage(usage: Any) -> bytes:
    return json.dumps(completion(GOOD, usage=usage)).encode()


BAD = {name: with_usage(usage) for name, usage in BAD_USAGE.items()} | {
    name: with_usage({"prompt_tokens": 100, "completion_tokens": 123321}).replace(b"123321", number)
    for name, number in NOT_JSON.items()
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_impossible_usage_is_charged_at_the_reservation_and_flagged(
    server: ScriptedServer, tmp_path: Path, body: bytes
) -> None:
    server.script((200, {}, body))
    llm = make_paying(server, tmp_path, cap=10.0)
    assert ask(llm).grade == 2
    assert committed(tmp_path) == pytest.approx(ATTEMPT)
    [row] = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert row["cost_usd"] == pytest.approx(ATTEMPT)
    assert row["usage_fault"]


def test_plausible_usage_is_not_flagged(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_paying(server, tmp_path, cap=10.0)
    ask(llm)
    assert committed(tmp_path) == pytest.approx(20 * 1000 / 1e6)
    assert [row.usage_fault for row in llm.ledger.rows] == [""]


def test_impossible_usage_of_a_batch_row_is_charged_at_the_reservation(server: ScriptedServer, tmp_path: Path) -> None:
    server.script((200, {}, with_usage({"prompt_tokens": 100, "completion_tokens": -1})))
    llm = make_paying(server, tmp_path, cap=10.0)
    ask_batch(llm, {"s": SPEC}, BatchOptions("b", 0.02, 20), options=AskOptions("judge"))
    assert committed(tmp_path) == pytest.approx(ATTEMPT)
    assert [bool(row.usage_fault) for row in llm.ledger.rows] == [True]


def test_the_local_batch_runner_reserves_each_attempt(server: ScriptedServer, tmp_path: Path) -> None:
    from dataclasses import replace

    from tasks.services.llm.config import CapabilityConfig

    server.script((200, {}, b"[]"))
    able = CapabilityConfig(response_format="json_schema", batch="local")
    llm = make_paying(server, tmp_path, cap=3 * ATTEMPT, capabilities=able, max_attempts=10, timeout_seconds=60)
    llm.local = LocalServices(batch_folder=tmp_path / "batches")
    specs = {f"s{n}": replace(SPEC, repeat=n) for n in range(4)}
    with pytest.raises(BudgetExceeded):
        ask_batch(llm, specs, BatchOptions("b", 0.02, 20), options=AskOptions("judge"))
    assert server.counts[CHAT] == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_budget_file_blocks_new_reservations(server: ScriptedServer, tmp_path: Path, damage: str) -> None:
    budget = Budget(tmp_path / "budget.json", 1.0)
    budget.reconcile(budget.reserve(0.9), spent=0.9)
    path = tmp_path / "budget.json"
    data = path.read_bytes()
    changed = {"flip": data.replace(b"0.9", b"0.1", 1), "truncate": data[: len(data) // 2], "empty": b""}[damage]
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(BudgetExceeded, match=r"budget.json is damaged .* delete the file and run again"):
        budget.reserve(0.5)
    assert path.read_bytes() == changed


def test_a_reservation_is_reconciled_only_once(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget.json", 1.0)
    name = budget.reserve(0.6)
    budget.reconcile(name, spent=0.6)
    budget.reconcile(name, spent=0.0)
    with pytest.raises(BudgetExceeded):
        budget.reserve(0.5)


def test_spending_without_a_cap_counts_toward_a_cap_set_later(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    free = Budget(path, None)
    free.reconcile(free.reserve(0.0), spent=0.0)
    assert not path.exists()
    free.reconcile(free.reserve(5.0), spent=4.0)
    free.reserve(2.0)  # of a process that was killed
    with pytest.raises(BudgetExceeded, match=r"6\.0000 of 6\.5000 USD"):
        Budget(path, 6.5).reserve(1.0)
    Budget(path, 7.5).reserve(1.0)


def test_without_a_cap_a_damaged_budget_file_is_ignored_and_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    path.write_bytes(b"{")
    free = Budget(path, None)
    free.reconcile(free.reserve(5.0), spent=5.0)
    assert path.read_bytes() == b"{"
    with pytest.raises(BudgetExceeded, match="is damaged"):
        Budget(path, 1.0).reserve(0.1)
