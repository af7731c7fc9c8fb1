"""Pages in Debian's Chromium, headless; tests are skipped where it is not installed."""

import json
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
NO_SCROLLING = "[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)"
"""On a phone too, no table is scrolled sideways."""


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


@contextmanager
def open_file(path: Path, width: int) -> Iterator["Page"]:
    """Yield a page with a file; fails for a request to elsewhere, an error, or a message on the console."""
    found: list[str] = []
    with open_page(width) as page:
        page.on("console", lambda message: found.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: found.append(f"error: {error}"))
        page.on("request", lambda sent: None if sent.url.startswith(("file:", "data:")) else found.append(sent.url))
        page.goto(path.as_uri())
        yield page
    assert found == []


def check_accessible(page: "Page") -> None:
    """Fail where axe-core finds something serious, in light or dark."""
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        serious = [
            violation
            for violation in Axe().run(page).response["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == [], json.dumps(serious, indent=1)[:3000]


def keep_screenshot(page: "Page", name: str) -> None:
    """Save the whole page below LIKENESS_SCREENSHOTS, where that is set, for a person to look at."""
    folder = os.environ.get("LIKENESS_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
