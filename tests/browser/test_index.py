"""The index of `likeness serve` in a browser: three widths, light and dark, and nothing from outside."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conf.request import RunRequest
from flows.cli.serve.server import HOST, QuietServer, make_handler
from flows.runs.records import write_request, write_summary
from flows.subjects.index_page import write_index
from flows.subjects.records import SubjectOutcome
from tasks.manifests.run_summary import RunError, RunSummary, make_head
from tasks.services.store.local import LocalStore
from tests.support.browser import NO_SCROLLING, check_accessible, keep_screenshot, open_page
from tests.support.summary import make_measured_summary

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (390, 1280, 2560)
COUNT_LINES = (
    "e => { const all = document.createRange(); all.selectNodeContents(e); return all.getClientRects().length }"
)
FINISHED, FAILED = "20260101-000000-fish-0001", "20260102-000000-a-very-long-class-noun-of-many-words-0002"


def fail(run_id: str) -> RunSummary:
    reason = "2 of 5 instance images failed QC (02: subject not visible; 05: two subjects); add 1 image, " * 2
    error = RunError(kind="SubjectRejected", message=f"{reason}{'x' * 120}")
    return make_head(run_id, "failed").model_copy(update={"error": error})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder with a finished run, a failed one, and a page of two subjects."""
    links = {"prefect": "http://127.0.0.1:4200/runs/1", "mlflow": "http://127.0.0.1:5000/#/experiments/1/runs/1"}
    measured = make_measured_summary(FINISHED)
    wide = {name: measured.estimates["dino"] for name in ("dino", "clip_i", "clip_t")}
    finished = measured.model_copy(update={"links": links, "cost_usd": 0.01, "estimates": wide})
    for summary in (finished, fail(FAILED)):
        (tmp_path / summary.run_id).mkdir()
        write_request(tmp_path / summary.run_id, RunRequest(), is_trusted=True)
        write_summary(tmp_path / summary.run_id, summary)
    (tmp_path / FINISHED / "report.html").write_text("<html><body><h1>Our fish</h1></body></html>")
    outcomes = [
        SubjectOutcome(name="a fish", status="finished", run_id=FINISHED, summary=finished),
        SubjectOutcome(name="a mug", status="failed", run_id=FAILED, reason="x" * 200),
    ]
    write_index(tmp_path / "many" / "subjects", outcomes, title="subjects", store=LocalStore(tmp_path / "store"))
    return tmp_path


@pytest.fixture(params=WIDTHS)
def served(request: pytest.FixtureRequest, output: Path) -> Iterator[tuple["Page", str]]:
    """A page and the server's address; fails for a request to elsewhere, an error, or a message on the console."""
    found: list[str] = []
    with QuietServer((HOST, 0), make_handler(output)) as server, open_page(request.param) as page:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://{HOST}:{server.server_address[1]}"
        page.on("console", lambda message: found.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: found.append(f"error: {error}"))
        page.on("request", lambda sent: None if sent.url.startswith((address, "data:")) else found.append(sent.url))
        yield page, address
        server.shutdown()
    assert found == []


def test_the_index_fits_its_width_and_axe_finds_nothing_serious(served: tuple["Page", str]) -> None:
    page, address = served
    page.goto(address)
    width = page.viewport_size["width"] if page.viewport_size else 0
    keep_screenshot(page, f"index-{width}")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    row = page.locator("tr", has_text=FINISHED)
    assert page.evaluate(NO_SCROLLING)
    statuses = [cell.evaluate(COUNT_LINES) for cell in page.locator("td.finished, td.failed").all()]
    assert statuses == [1, 1], "a word is broken to make room for other columns"
    assert row.get_by_text("0.71 [0.66, 0.75]").first.is_visible()
    check_accessible(page)
    row.get_by_role("link", name=FINISHED).click()
    assert page.get_by_role("heading", name="Our fish").is_visible()


def test_the_page_of_many_subjects_fits_its_width_and_leads_to_reports(served: tuple["Page", str]) -> None:
    page, address = served
    page.goto(f"{address}/many/subjects/index.html")
    keep_screenshot(page, f"many-{page.viewport_size['width'] if page.viewport_size else 0}")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(NO_SCROLLING)
    assert page.get_by_text("0.71 [0.66, 0.75]").first.is_visible()
    check_accessible(page)
