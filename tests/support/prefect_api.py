"""What tests ask of a Prefect server as its UI does."""

import time
import uuid
from pathlib import Path
from typing import Any

import httpx

from conf.overrides import parse_overrides
from flows.cli.stack.stack import PREFECT, read_state
from flows.cli.stack.submit import DEPLOYMENT

PATIENCE_SECONDS = 180.0
QUICK_HEARTBEATS = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "34"}
"""Nearly Prefect's shortest, of 30 s; `likeness up` waits for three of them."""


class PatientTransport(httpx.HTTPTransport):
    """Asks again while the server restarts, or answers 503 since its database is locked."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                response = super().handle_request(request)
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            else:
                if response.status_code < 500 or time.monotonic() > deadline:
                    return response
                response.close()
            time.sleep(1)


def open_api(output: Path) -> httpx.Client:
    """Return a client of the Prefect server of a stack."""
    port = next(process.port for process in read_state(output).processes if process.name == PREFECT)
    return httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60, transport=PatientTransport())


def create_flow_run(client: httpx.Client, words: list[str]) -> str:
    """Create a flow run of the main job's deployment and return its id."""
    request = parse_overrides(words).model_dump(mode="json", exclude_unset=True)
    return run_deployed(client, DEPLOYMENT, request=request)


def run_deployed(client: httpx.Client, name: str, **parameters: Any) -> str:
    """Create a flow run of a deployment, FLOW/NAME, and return its id."""
    deployment = client.get(f"/deployments/name/{name}").raise_for_status().json()
    # With a key: a request that is repeated creates no second run.
    key = {"idempotency_key": str(uuid.uuid4())}
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}, **key}
    run = client.post(f"/deployments/{deployment['id']}/create_flow_run", json=body).raise_for_status().json()
    return str(run["id"])


def read_flow_run(client: httpx.Client, flow_run_id: str) -> dict[str, Any]:
    """Return a flow run."""
    found: dict[str, Any] = client.get(f"/flow_runs/{flow_run_id}").raise_for_status().json()
    return found


def read_states(client: httpx.Client, flow_run_id: str) -> list[dict[str, Any]]:
    """Return the states of a flow run, oldest first."""
    found = client.get("/flow_run_states/", params={"flow_run_id": flow_run_id}).raise_for_status().json()
    return sorted(found, key=lambda state: str(state["timestamp"]))


def wait_for_type(client: httpx.Client, flow_run_id: str, *types: str, seconds: float) -> dict[str, Any]:
    """Wait until a flow run is in a state of one of some types, and return the run."""
    deadline = time.monotonic() + seconds
    while (run := read_flow_run(client, flow_run_id))["state_type"] not in types:
        assert time.monotonic() < deadline, run["state"]
        time.sleep(1)
    return run
