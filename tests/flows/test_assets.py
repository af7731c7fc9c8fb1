"""Prefect's assets of a run: what its stages made, of what, and what a second run reuses."""

import json
import time
import urllib.request
from typing import Any

from tests.support.cli_sandbox import CliSandbox

MADE, USED = "prefect.asset.materialization.succeeded", "prefect.asset.referenced"


def find_events(place: CliSandbox, flow_run_id: str, *, least: int) -> list[dict[str, Any]]:
    """Return the asset events of a flow run, oldest first; the server stores them a moment after they are sent."""
    body = {
        "filter": {
            "event": {"prefix": ["prefect.asset."]},
            "any_resource": {"id": [f"prefect.flow-run.{flow_run_id}"]},
            "order": "ASC",
        },
        "limit": 50,
    }
    request = urllib.request.Request(
        f"{place.server_url}/events/filter", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(request, timeout=60) as response:
            events: list[dict[str, Any]] = json.loads(response.read())["events"]
        if len(events) >= least or time.monotonic() > deadline:
            return events
        time.sleep(0.5)


def list_upstream(event: dict[str, Any]) -> set[str]:
    return {each["prefect.resource.id"] for each in event["related"] if each.get("prefect.resource.role") == "asset"}


def test_stages_materialize_assets_with_lineage_and_a_cached_run_references_them(
    sandbox: CliSandbox, first_run: dict[str, Any]
) -> None:
    keys = {stage: record["key"] for stage, record in first_run["stages"].items()}
    subject, prior = f"likeness://01-subject/{keys['subject']}", f"likeness://02-prior/{keys['prior']}"
    model, report = f"likeness://03-training/{keys['training']}", f"likeness://06-publishing/{keys['publishing']}"
    events = find_events(sandbox, first_run["flow_run_id"], least=8)
    made = {event["resource"]["prefect.resource.id"]: event for event in events if event["event"] == MADE}
    assert {key: list_upstream(event) for key, event in made.items()} == {
        subject: set(),
        prior: set(),
        model: {subject, prior},
        report: {model, subject},
    }
    assert made[model]["resource"]["prefect.resource.name"].startswith("tuned model")
    assert made[model]["payload"]["steps"] == first_run["stages"]["training"]["counts"]["steps"]
    again = sandbox.run()
    assert again.returncode == 0, again.stderr
    cached = find_events(sandbox, sandbox.newest()["flow_run_id"], least=4)
    assert {(event["event"], event["resource"]["prefect.resource.id"]) for event in cached} == {
        (USED, key) for key in (subject, prior, model, report)
    }
    assert str(sandbox.folder) not in json.dumps([*events, *cached])
