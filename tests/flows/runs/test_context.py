"""The links of a run to the servers that show it."""

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.runs.context import EMBEDDED_VARIABLE, REPORTS_VARIABLE, find_links

RUN_ID = "446afecd-aae1-4443-8f37-c744c69db6c2"


def test_the_link_to_prefect_is_a_page_of_its_ui(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMBEDDED_VARIABLE, raising=False)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", RUN_ID)
    monkeypatch.setenv(REPORTS_VARIABLE, "http://127.0.0.1:4300/")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        links = find_links("20261128-a")
    assert links == {
        "prefect": f"http://127.0.0.1:4200/runs/flow-run/{RUN_ID}",
        "report": "http://127.0.0.1:4300/runs/20261128-a/report.html",
    }


def test_an_embedded_server_is_not_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EMBEDDED_VARIABLE, "1")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", RUN_ID)
    monkeypatch.delenv(REPORTS_VARIABLE, raising=False)
    assert find_links("20261128-a") == {}
