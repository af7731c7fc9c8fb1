"""Pages and states of runs on a real stack, as a person and the stack's tests look at them."""

import time
from typing import TYPE_CHECKING, Any

import httpx

from tests.support.browser import is_installed, keep_screenshot, open_page

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

SECONDS = 900


def find_field(page: "Page", label: str) -> "Locator":
    """Return the field of Prefect's form with a label."""
    named = page.locator(".schema-form-property__label", has_text=label)
    return page.locator(".schema-form-property").filter(has=named).last


def click_submit(page: "Page") -> None:
    """Submit the form; on a busy machine a click may come before the page listens to it."""
    from playwright.sync_api import TimeoutError as PageTimeout

    for is_last in (False, False, True):
        try:
            with page.expect_response(lambda response: "create_flow_run" in response.url, timeout=20_000):
                page.get_by_role("button", name="Submit").click()
            return
        except PageTimeout:
            if is_last:
                raise


def show_progress(prefect: str, run_id: str) -> None:
    """Open the artifacts of a run that trained: how far each stage is, or was at its end."""
    if not is_installed():
        return
    with open_page(1280, 1800) as page:  # what is out of sight is not drawn
        page.goto(f"{prefect}/runs/flow-run/{run_id}")
        page.get_by_text("Completed", exact=True).first.wait_for(timeout=60_000)  # the page listens to clicks then
        page.get_by_text("Artifacts", exact=True).first.click()
        page.get_by_text("progress-training").first.wait_for(timeout=60_000)
        keep_screenshot(page, "progress")


def show_question(prefect: str, run_id: str) -> None:
    """Open the form that a person fills in to continue a run."""
    if not is_installed():
        return
    with open_page(1280, 1500) as page:
        page.goto(f"{prefect}/runs/flow-run/{run_id}")
        page.get_by_role("button", name="Resume").first.click(timeout=60_000)
        find_field(page, "Photo 1").first.wait_for(timeout=60_000)
        keep_screenshot(page, "approval")


def wait_for_messages(messages: list[dict[str, str]], name: str, *states: str) -> None:
    """Wait until the webhook has heard of a run's states."""
    for state in states:
        deadline = time.monotonic() + 60
        while not any(name in each["subject"] and each["subject"].endswith(state) for each in messages):
            assert time.monotonic() < deadline, [each["subject"] for each in messages]
            time.sleep(0.5)


def wait_for_state(client: httpx.Client, run_id: str, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS
    while True:
        run: dict[str, Any] = client.get(f"/flow_runs/{run_id}").json()
        if run["state"]["name"] == name:
            return run
        assert run["state"]["type"] not in ("FAILED", "CANCELLED"), run["state"]
        assert time.monotonic() < deadline, run["state"]
        time.sleep(1)


def find_artifacts(client: httpx.Client, run_id: str) -> list[dict[str, Any]]:
    body = {"flow_runs": {"id": {"any_": [run_id]}}}
    found: list[dict[str, Any]] = client.post("/artifacts/filter", json=body).raise_for_status().json()
    return found


def find_requests(client: httpx.Client, *, class_noun: str) -> list[dict[str, Any]]:
    """Return the flow runs whose request names a class noun by its field."""
    runs: list[dict[str, Any]] = client.post("/flow_runs/filter", json={}).json()
    return [run for run in runs if run["parameters"].get("request", {}).get("class_noun") == class_noun]
