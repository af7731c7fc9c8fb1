"""What `likeness doctor` and the estimate say of profiles, before anything is paid for."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from flows.costs import sum_costs
from tasks.services.llm.config import CapabilityConfig, ProfileConfig
from tasks.services.llm.doctor import check_retirement, examine
from tasks.services.llm.estimate import estimate_calls
from tests.llm_server import ScriptedServer, completion, scripted_server
from tests.tasks.services.llm.test_client import GOOD, SPEC, ask, make_llm

TODAY = datetime.date(2026, 11, 22)


class Listing(ScriptedServer):
    """Lists its models; sees red, unless it is another model that answers."""

    served = "asked-model"

    def next_answer(self) -> Any:
        return 200, {}, json.dumps(completion('{"color": "red"}', model=self.served)).encode()


@pytest.mark.parametrize(
    ("retired_on", "is_good", "detail"),
    [
        (None, True, "none announced"),
        (datetime.date(2026, 10, 23), False, "was retired on 2026-10-23"),
        (datetime.date(2026, 12, 1), False, "in 9 days"),
        (datetime.date(2027, 4, 14), True, "on 2027-04-14"),
    ],
)
def test_retirement_is_told_in_time(retired_on: datetime.date | None, is_good: bool, detail: str) -> None:
    found = check_retirement(ProfileConfig(model="m", retired_on=retired_on), today=TODAY)
    assert found.is_good is is_good
    assert detail in found.detail


def test_a_missing_key_ends_the_examination_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with scripted_server() as server:
        findings = list(examine(make_llm(server, tmp_path, api_key_variable="SOME_KEY"), "p"))
        assert not server.counts
    assert [(finding.name, finding.is_good) for finding in findings] == [("retirement", True), ("key", False)]


@pytest.mark.parametrize(("served", "is_good"), [("asked-model", True), ("dear-model", False)])
def test_pictures_are_tried_and_another_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: str, is_good: bool
) -> None:
    from tasks.services.llm import doctor

    monkeypatch.setattr(doctor, "check_listed", lambda llm, name: doctor.Finding("models", True, "listed"))
    listing = Listing()
    listing.served = served
    capabilities = CapabilityConfig(structure="json_schema", tools=False, streaming=False)
    with scripted_server(listing) as server:
        found = {f.name: f for f in examine(make_llm(server, tmp_path, capabilities=capabilities), "p")}
    assert found["pictures"].is_good is is_good
    assert served in found["pictures"].detail


def test_costs_are_summed_by_role_and_unknown_stays_unknown(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        llm = make_llm(server, tmp_path)
        ask(llm)
        ask(llm)
    [row] = sum_costs([json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()])
    assert (row["calls"], row["kept"], row["input_tokens"], row["cost_usd"]) == (1, 1, 100, None)


def test_an_estimate_counts_calls_and_takes_the_batch_price(tmp_path: Path) -> None:
    with scripted_server() as server:
        prices = {"input": 1.0, "output": 10.0, "batch_discount": 0.5, "date": "d"}
        config = make_llm(server, tmp_path, prices=prices).config
        whole, half = (estimate_calls(config, "judge", [SPEC] * 3, is_batch=is_batch) for is_batch in (False, True))
        assert not server.counts
    assert whole.calls == 3
    assert whole.low_usd == pytest.approx((whole.input_tokens * 1.0 + 3 * 120 * 10.0) / 1e6)
    assert half.low_usd == pytest.approx((whole.low_usd or 0) / 2)
    assert whole.high_usd == pytest.approx((whole.input_tokens * 1.0 + 3 * 600 * 10.0) / 1e6)
