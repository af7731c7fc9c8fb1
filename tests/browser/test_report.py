"""The report in a browser: three widths, with and without scripts, by keyboard, and what axe-core says of it."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from conf.request import RunRequest
from flows.cli.serve.server import HOST, QuietServer, make_handler
from flows.runs.records import write_request, write_start
from tasks.manifests.scoring import Judgement
from tasks.manifests.training import LossRow, PhotoCrops
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.services.store.local import LocalStore
from tests.support.browser import check_accessible, keep_screenshot, open_file, open_page
from tests.support.report import GATE, make_run, with_grades

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (390, 1280, 2560)


@pytest.fixture
def report(store: LocalStore, tmp_path: Path) -> Path:
    """A report of a small run with grades."""
    run = with_grades(make_run(store))
    grades = tuple(
        Judgement(
            sample=sample.image, side=sample.side, prompt=sample.prompt, evidence=f"evidence {number} <script>",
            concept_preservation=number, prompt_following=3, image_quality=2,
        )
        for number, sample in enumerate(run.evaluation.samples)
    )  # fmt: skip
    crops = PhotoCrops(photo=run.subject.images[0].image, boxes=((0.25, 0.0, 0.75, 1.0),))
    run = replace(
        run,
        scoring=run.scoring.model_copy(update={"judgements": grades}),
        training=run.training.model_copy(update={"crops": (crops,)}),
    )
    losses = [LossRow(step=step, loss=1.0, instance_loss=1 / step, prior_loss=0.5) for step in range(1, 50)]
    rows = [("training.learning_rate", "1e-5"), ("seed", "23")]
    inputs = ReportInputs(
        "One fish", run, losses, rows, GATE, {"training.learning_rate": "2e-6", "seed": "23"}, {"torch": "2"},
        [("Command line", 'likeness generate latest "a photo of sks fish"')],
    )  # fmt: skip
    path = tmp_path / "report.html"
    path.write_text(render_report(store, inputs))
    return path


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, report: Path) -> Iterator["Page"]:
    """The report at one width; fails for a request to elsewhere or a message on the console."""
    with open_file(report, request.param) as page:
        yield page


def test_the_page_fits_its_width_and_axe_finds_nothing_serious(page: "Page") -> None:
    keep_screenshot(page, f"report-{page.viewport_size['width'] if page.viewport_size else 0}")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    check_accessible(page)


def test_the_slider_moves_and_the_light_box_opens_by_keyboard(page: "Page") -> None:
    slider = page.locator(".pair input").first
    slider.focus()
    before = page.locator(".pair").first.evaluate("e => e.style.getPropertyValue('--cut')")
    page.keyboard.press("ArrowRight")
    assert page.locator(".pair").first.evaluate("e => e.style.getPropertyValue('--cut')") != before
    page.locator(".open").first.focus()
    page.keyboard.press("Enter")
    box = page.locator("dialog")
    assert box.is_visible()
    assert box.locator("img").count() == 2
    first = box.locator("h3").inner_text()
    page.keyboard.press("ArrowRight")
    assert box.locator("h3").inner_text() != first
    assert "evidence" in box.inner_text()
    page.keyboard.press("Escape")
    assert not box.is_visible()
    assert page.evaluate("document.activeElement.classList.contains('open')")


def test_samples_are_sorted_by_metric(page: "Page") -> None:
    def order() -> list[str]:
        return page.locator("#gallery h3").all_inner_texts()

    configured = order()
    page.locator("#order").select_option("dino best")
    best = order()
    page.locator("#order").select_option("dino worst")
    assert order() == best[::-1]
    page.locator("#order").select_option("prompt")
    assert order() == configured
    assert best == configured[::-1]  # the second prompt has the larger DINO


@contextmanager
def open_without_scripts(report: Path) -> Iterator["Page"]:
    """Open a report in a browser that runs no scripts."""
    with open_page(1280) as page:
        browser = page.context.browser
        assert browser is not None
        plain = browser.new_context(java_script_enabled=False).new_page()
        plain.goto(report.as_uri())
        yield plain


def test_without_scripts_both_pictures_and_the_evidence_are_there(report: Path) -> None:
    with open_without_scripts(report) as plain:
        assert plain.locator(".pair").first.locator("img").count() == 2
        assert all(image.is_visible() for image in plain.locator(".pair img").all())
        assert not plain.locator("#order").is_visible()
        plain.locator("details.info summary").first.click()
        assert "evidence 0 <script>" in plain.locator("details.info").first.inner_text()


@pytest.mark.parametrize(("motion", "behavior"), [("reduce", "auto"), ("no-preference", "smooth")])
def test_reduced_motion_is_honoured(report: Path, motion: Literal["reduce", "no-preference"], behavior: str) -> None:
    with open_file(report, 1280) as page:
        page.emulate_media(reduced_motion=motion)
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behavior
        page.locator("nav a").last.click()
        moving = page.evaluate("document.getAnimations().length")
        if motion == "reduce":
            # The jump has ended before the next script runs.
            assert abs(page.locator("#lineage").bounding_box()["y"]) < page.viewport_size["height"]  # type: ignore[index]
            assert moving == 0


def test_a_digest_opens_to_its_full_length_without_scripts(report: Path) -> None:
    with open_without_scripts(report) as plain:
        digest = plain.locator("#lineage ~ .scroll .digest").last
        assert not digest.locator(".whole").is_visible()
        digest.locator("summary").click()
        assert len(digest.locator(".whole").inner_text()) == 64


def test_crops_lie_over_their_photos(page: "Page") -> None:
    photo, frame = (page.locator(f".photo {part}").first.bounding_box() for part in ("img", ".crop"))
    assert photo is not None and frame is not None
    # The frame holds the middle half of a square photo, over its whole height.
    assert frame["width"] == pytest.approx(photo["width"] / 2, abs=3)
    assert frame["x"] == pytest.approx(photo["x"] + photo["width"] / 4, abs=3)
    assert frame["height"] == pytest.approx(photo["height"], abs=3)


def test_only_changed_settings_are_listed_as_changed(page: "Page") -> None:
    changed = page.get_by_role("region", name="Changed settings").locator("tbody code").all_inner_texts()
    assert changed == ["training.learning_rate", "1e-5", "2e-6"]


def test_a_served_report_works_as_the_file_does(report: Path, tmp_path: Path) -> None:
    """Its script passes the content security policy of `likeness serve`."""
    name = "20260101-000000-fish-0001"
    (tmp_path / "runs" / name).mkdir(parents=True)
    write_request(tmp_path / "runs" / name, RunRequest(), is_trusted=True)
    write_start(tmp_path / "runs" / name, name)
    shutil.copy(report, tmp_path / "runs" / name / "report.html")
    found: list[str] = []
    with QuietServer((HOST, 0), make_handler(tmp_path / "runs")) as server, open_page(1280) as page:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.on("console", lambda message: found.append(message.text))
        page.goto(f"http://{HOST}:{server.server_address[1]}/runs/{name}/report.html")
        pair = page.locator(".pair").first
        before = pair.evaluate("e => e.style.getPropertyValue('--cut')")
        page.locator(".pair input").first.focus()
        page.keyboard.press("ArrowRight")
        assert pair.evaluate("e => e.style.getPropertyValue('--cut')") != before
        server.shutdown()
    assert [text for text in found if "favicon" not in text] == []
