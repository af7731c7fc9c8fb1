"""Pages in Debian's Chromium, headless; tests are skipped where it is not installed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

# No sandbox: containers rarely allow one. No background requests: they would leave the machine.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@contextmanager
def open_page(width: int, height: int = 900) -> Iterator["Page"]:
    """Yield an empty page of the given size in px."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed; get it by: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


def keep_screenshot(page: "Page", name: str) -> None:
    """Save the whole page below LIKENESS_SCREENSHOTS, where that is set, for a person to look at."""
    folder = os.environ.get("LIKENESS_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
