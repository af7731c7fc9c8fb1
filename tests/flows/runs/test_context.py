"""What surrounds a run: links to the servers that show it, leftovers of killed processes."""

from pathlib import Path
from unittest.mock import Mock

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from conf.overrides import parse_overrides
from flows.runs.context import EMBEDDED_VARIABLE, REPORTS_VARIABLE, find_links, open_run, remove_leftovers
from flows.runs.records import list_summaries
from tasks.errors import StorageFull
from tasks.manifests.publishing import Publication
from tasks.services.store.local import LocalStore
from tasks.stage.files import HOST, PART_PREFIX

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


def test_the_link_to_prefect_is_the_address_that_people_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMBEDDED_VARIABLE, raising=False)
    monkeypatch.delenv(REPORTS_VARIABLE, raising=False)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", RUN_ID)
    public = {PREFECT_API_URL: "http://prefect:4200/api", PREFECT_UI_URL: "https://prefect.example.com"}
    with temporary_settings(public):
        links = find_links("20261128-a")
    assert links == {"prefect": f"https://prefect.example.com/runs/flow-run/{RUN_ID}"}


@pytest.mark.parametrize("tracking", ["mlflow", "none"])
def test_the_report_is_linked_as_an_artifact_of_the_tracking_run_where_no_report_server_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: str
) -> None:
    monkeypatch.setenv(EMBEDDED_VARIABLE, "1")
    monkeypatch.setenv("LIKENESS_MLFLOW_URL", "https://mlflow.example.com")
    monkeypatch.delenv(REPORTS_VARIABLE, raising=False)
    request = parse_overrides([f"output_dir={tmp_path}", f"tracking={tracking}"])
    publication = Publication.model_construct(tracking_run_id=None if tracking == "none" else "r1")
    with open_run(request, is_trusted=True) as run:
        links = run.list_links(publication)
        monkeypatch.setenv(REPORTS_VARIABLE, "https://reports.example.com")
        served = run.list_links(publication)
    page = "https://mlflow.example.com/#/experiments/1/runs/r1"
    report = {"mlflow": page, "report": f"{page}/artifacts/report/index.html"}
    assert links == ({} if tracking == "none" else report)
    assert served["report"].startswith("https://reports.example.com/")


@pytest.mark.parametrize("place", ["runs/store", "elsewhere"])
def test_a_start_removes_leftovers_in_the_output_folder_and_in_the_store(tmp_path: Path, place: str) -> None:
    store = LocalStore(tmp_path / place)
    gone = f"{PART_PREFIX}{HOST}-{2**22 - 1}-x"  # above the largest pid
    parts = [tmp_path / "runs" / "20260101-a" / gone, store.root / "02-prior" / "k" / gone]
    for part in parts:
        part.parent.mkdir(parents=True)
        part.touch()
    remove_leftovers(tmp_path / "runs", store)
    assert [part.exists() for part in parts] == [False, False]


def test_what_fails_while_a_run_ends_does_not_hide_why_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EMBEDDED_VARIABLE, "1")
    request = parse_overrides([f"output_dir={tmp_path}", "tracking=none"])

    def fail() -> None:
        with open_run(request, is_trusted=True) as run:
            monkeypatch.setattr(run.runtime.live, "abandon", Mock(side_effect=OSError(27, "File too large")))
            raise StorageFull("no room left")

    with pytest.raises(StorageFull, match="no room"):
        fail()
    with monkeypatch.context() as patch:
        patch.setattr("flows.runs.context.write_end", Mock(side_effect=StorageFull("summary.json")))
        with pytest.raises(StorageFull, match="no room"):
            fail()
    # The second one could not be written.
    [summary] = [each for each in list_summaries(tmp_path) if each.status != "running"]
    assert summary.status == "failed"
    assert summary.error is not None
    assert summary.error.kind == "StorageFull"
