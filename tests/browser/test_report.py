"""The report in a browser: three widths, with and without scripts, by keyboard, and what axe-core says of it."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from conf.request import RunRequest
from flows.cli.serve.server import HOST, QuietServer, make_handler
from flows.runs.records import write_request, write_start
from tasks.publishing.report.page import render_report
from tasks.services.store.local import LocalStore
from tests.support.browser import NO_SCROLLING, check_accessible, keep_screenshot, open_file, open_page
from tests.support.full_report import make_full_inputs

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (390, 1280, 2560)


@pytest.fixture
def report(store: LocalStore, tmp_path: Path) -> Path:
    """A report with everything that one can show."""
    path = tmp_path / "report.html"
    path.write_text(render_report(store, make_full_inputs(store)))
    return path


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, report: Path) -> Iterator["Page"]:
    """The report at one width; fails for a request to elsewhere or a message on the console."""
    with open_file(report, request.param) as page:
        yield page


def test_the_page_fits_its_width_and_axe_finds_nothing_serious(page: "Page") -> None:
    width = page.viewport_size["width"] if page.viewport_size else 0
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        keep_screenshot(page, f"report-{width}-{scheme}")
    assert page.evaluate(NO_SCROLLING)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    check_accessible(page)


def test_no_table_scrolls_sideways_on_a_phone(report: Path) -> None:
    with open_file(report, 390) as page:
        page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
        keep_screenshot(page, "report-390-open")
        assert page.locator(".scroll").count() == 9
        wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(f"{wide}.map(e => e.getAttribute('aria-label'))") == []
        assert page.evaluate(NO_SCROLLING)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


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
    assert "evidence 1 <script>" in box.inner_text()
    assert "COMPOSITION_SCORE_OF_ANOTHER_PACKAGE" in box.inner_text()
    page.keyboard.press("Escape")
    assert not box.is_visible()
    assert page.evaluate("document.activeElement.classList.contains('open')")


def test_each_copy_button_copies_its_snippet(page: "Page") -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])  # of all origins: a file has none to name
    snippets = page.locator(".snippet")
    texts = [snippet.locator("pre").text_content() for snippet in snippets.all()]
    assert len(set(texts)) == len(texts) >= 3
    for snippet, text in zip(snippets.all(), texts, strict=True):
        button = snippet.get_by_role("button", name="copy")
        button.focus()
        page.keyboard.press("Enter")
        snippet.get_by_role("button", name="copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == text


def test_without_the_permission_a_copy_button_copies_its_snippet_too(report: Path) -> None:
    with open_file(report, 1280) as page:
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no permission')) }")
        snippet = page.locator(".snippet").last
        snippet.get_by_role("button").click()
        snippet.get_by_role("button", name="copied").wait_for()
        text = snippet.locator("pre").text_content()
        assert page.evaluate("getSelection().toString()").strip() == str(text).strip()


def test_a_click_on_the_note_of_a_near_duplicate_copies_nothing(report: Path) -> None:
    with open_file(report, 1280) as page:  # which fails for an error of a script
        note = page.locator("p", has_text="Near-duplicate of a photo").first
        before = note.text_content()
        note.click()
        assert note.text_content() == before


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
        evidence = plain.locator("details.info", has_text="judge's evidence").first
        evidence.locator("summary").click()
        assert "evidence 0 <script>" in evidence.inner_text()
        plain.locator("details.info summary", has_text="other metrics").first.click()
        assert plain.get_by_text("COMPOSITION_SCORE_OF_ANOTHER_PACKAGE").first.is_visible()


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
    assert changed == ["training.learning_rate", "1e-5", "2e-6", "subject.source", "…/photos", "???"]


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
