"""The page of `likeness compare` in a browser: three widths, light and dark, and nothing from outside."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows.cli.results.compare import compare_runs
from tests.support.browser import check_accessible, keep_screenshot, open_file
from tests.support.comparison import PROMPTS, make_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (390, 1280, 2560)


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["Page"]:
    """The comparison at one width; fails for a request to elsewhere or a message on the console."""
    for name in ("20261128-105254-fish-34eb", "20261128-110132-fish-dc95"):
        make_run(tmp_path, name, *(["training.max_train_steps=400"] if name.endswith("5") else []))
    text = compare_runs(tmp_path, ("34eb", "dc95"), is_paired=True, as_format="html")
    path = tmp_path / "comparison.html"
    path.write_text(text)
    with open_file(path, request.param) as page:
        yield page


def test_the_page_fits_its_width_with_both_samples_beside_each_other(page: "Page") -> None:
    keep_screenshot(page, f"comparison-{page.viewport_size['width'] if page.viewport_size else 0}")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    rows = page.locator(".row").all()
    assert len(rows) == PROMPTS * 2
    first, second = (figure.bounding_box() for figure in rows[0].locator("figure").all())
    assert first is not None
    assert second is not None
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]
    check_accessible(page)
