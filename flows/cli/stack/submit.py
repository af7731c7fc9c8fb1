"""`likeness submit`: send a run to the worker, and follow it."""

import datetime
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.request import RunRequest
from flows.cli.stack.server import check_server
from flows.cli.stack.stack import find_api_url
from flows.subjects.waiting import explain_wait
from tasks.errors import ConfigError, ServiceUnavailable
from tasks.redaction import clean_text

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas import OrchestrationResult
    from prefect.client.schemas.objects import FlowRun, State

DEPLOYMENT = "personalize-subject/personalize-subject"
POLL_SECONDS = 1.0
RESCHEDULE_SECONDS = 30.0
"""After which a crashed run is scheduled again from here; the automation needs less."""
CANCEL_CODE, FAILED_CODE = 130, 1


class UnknownRun(ConfigError):
    """The server knows no flow run of this name."""

    kind = "ConfigError"


def submit(settings: Sequence[str], output: Path, *, is_detached: bool) -> int:
    """Send a run to the work pool; follow it to its end unless detached.

    Without a stack here, PREFECT_API_URL leads to workers elsewhere: paths are theirs, and left as they are.

    Raises:
        ConfigError: no stack runs, it has no deployment, or a setting is invalid: nothing was sent.

    """
    is_local = bool(find_api_url(output))
    request = make_request(settings, output) if is_local else parse_overrides(settings)
    # Checked here with the deployment's restrictions left to the worker: its folders are not those of this machine.
    compile_request(request)
    connect(output)
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.utilities.urls import url_for

    from flows.runs.artifacts import NAMED, make_name

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound as error:
            raise ConfigError(
                f"the server has no deployment {DEPLOYMENT}; `python -m deployments.register process` registers it"
            ) from error
        plain = request.model_dump(mode="json", exclude_unset=True)
        run = client.create_flow_run_from_deployment(
            deployment.id, parameters={"request": plain}, tags=["likeness", NAMED], name=make_name(request)
        )
        print(f"submitted {run.name}: {url_for('flow-run', obj_id=run.id)}")
        if is_detached:
            return 0
        try:
            return follow(client, run.id)
        except KeyboardInterrupt:
            print(f"\ndetached; {run.name} is still running: `likeness logs {run.name}`, `likeness cancel {run.name}`")
            return 0


def make_request(settings: Sequence[str], output: Path) -> RunRequest:
    """Return the request of the settings, with folders as absolute paths: the worker has another working directory.

    For a worker on this machine: one elsewhere has its own output folder, and other paths.
    """
    request = parse_overrides(settings)
    values = dict(request.settings)
    source = values.get("subject.source")
    if isinstance(source, str) and source != "demo" and not source.startswith("store:"):
        values["subject.source"] = str(Path(source).expanduser().absolute())
    values.setdefault("output_dir", str(output))
    return RunRequest.model_validate({**request.model_dump(exclude_unset=True), "settings": values})


def connect(output: Path) -> None:
    """Point Prefect's client at the stack, or at a configured server.

    Raises:
        ConfigError: there is none, or none that understands this client.
        ServiceUnavailable: it does not answer.

    """
    url = os.environ.get("PREFECT_API_URL") or find_api_url(output)
    if not url:
        raise ConfigError("no stack runs here: `likeness up` starts one, or set PREFECT_API_URL to your server")
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    check_server()


def follow(client: "SyncPrefectClient", run_id: uuid.UUID) -> int:
    """Print states and log lines until the run ends; return 0 where it completed."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterTimestamp
    from prefect.client.schemas.sorting import LogSort

    since = datetime.datetime.fromtimestamp(0, datetime.UTC)
    shown: set[uuid.UUID] = set()
    state_name = shown_reason = ""
    was_alive = False  # `logs` of a run that crashed long ago starts nothing
    while True:
        run = client.read_flow_run(run_id)
        state = run.state
        new_lines = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]), timestamp=LogFilterTimestamp(after_=since))
        for line in client.read_logs(new_lines, limit=200, sort=LogSort.TIMESTAMP_ASC):
            since = max(since, line.timestamp)
            if line.id not in shown:
                shown.add(line.id)
                print(clean_text(line.message, keep=""), flush=True)
        if state is not None and state.name != state_name:
            state_name = state.name or ""
            print(f"-- {state_name}{f': {clean_text(state.message)}' if state.message else ''}", flush=True)
        if state is not None and state.is_scheduled():
            reason = explain_wait(client, run)
            if reason and reason != shown_reason:
                print(f"-- waiting: {reason}", flush=True)
            shown_reason = reason
        was_alive = was_alive or (state is not None and not state.is_final())
        if state is not None and was_alive and state.is_crashed() and age_of(state) > RESCHEDULE_SECONDS:
            reschedule(client, run.id)
        # A crashed run is scheduled again by the stack's automation, and is followed on.
        if state is not None and state.is_final() and not state.is_crashed():
            return 0 if state.is_completed() else CANCEL_CODE if state.is_cancelled() else FAILED_CODE
        time.sleep(POLL_SECONDS)


def age_of(state: "State") -> float:
    """Return for how many seconds a state has been there."""
    return (datetime.datetime.now(datetime.UTC) - state.timestamp).total_seconds()


def reschedule(client: "SyncPrefectClient", run_id: uuid.UUID) -> None:
    """Schedule a crashed run again, as the stack's automation does.

    On SQLite the server may drop the event of a crash ("database is locked", dead letter queue) and handle the next one
    only a quarter of an hour later. A run that crashed too often fails by itself (`flows/runs/attempts.py`).
    """
    from prefect.states import Scheduled

    client.set_flow_run_state(run_id, Scheduled(message="rescheduled after a crash: it resumes"), force=True)


def find_flow_run(client: "SyncPrefectClient", name: str) -> "FlowRun":
    """Return the newest flow run of a name, or of an id. Raises ConfigError."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])),
        limit=1,
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
    )
    if not found:
        raise UnknownRun(f"the server knows no run named {name!r}; its UI lists them")
    return found[0]


def cancel(name: str, output: Path) -> int:
    """Ask the worker to cancel a run: training saves its checkpoint first."""
    connect(output)
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    with get_client(sync_client=True) as client:
        run = find_flow_run(client, name)
        if run.state is not None and run.state.is_final():
            raise ConfigError(f"{name} has ended: {run.state.name}")
        result: OrchestrationResult[object] = client.set_flow_run_state(
            run.id, Cancelling(message="cancelled by `likeness cancel`")
        )
        # A run without a process is cancelled at once, which the server reports as a rejected Cancelling.
        state = client.read_flow_run(run.id).state
        if state is None or not (state.is_cancelling() or state.is_cancelled()):
            raise ServiceUnavailable(f"the server does not cancel {name}: {result.status}")
    print(f"{name} is being cancelled; running it again resumes it")
    return 0


def resume_flow_run(name: str, output: Path) -> int:
    """Submit the request of a flow run again that failed, crashed or was cancelled, under its name, and follow it.

    Whatever worker takes it finds finished stages cached and the newest checkpoint in the store.

    Raises:
        ConfigError: the server knows no such run, or it has not ended, or has completed.

    """
    connect(output)
    from prefect.client.orchestration import get_client

    from flows.runs.artifacts import NAMED

    with get_client(sync_client=True) as client:
        run = find_flow_run(client, name)
        state = run.state
        if state is None or not state.is_final() or state.is_completed():
            raise ConfigError(f"flow run {name} is {state.name if state else 'new'}; `likeness logs {name}` follows it")
        if run.deployment_id is None:
            raise ConfigError(f"flow run {name} was no worker's; `likeness resume` takes its folder (`likeness runs`)")
        # A run of its own: one that is scheduled again and again fails for its number of attempts.
        again = client.create_flow_run_from_deployment(
            run.deployment_id, parameters=run.parameters, tags=list({*run.tags, NAMED}), name=run.name
        )
        print(f"{name} is submitted again: finished stages are cached, training continues from its newest checkpoint")
        try:
            return follow(client, again.id)
        except KeyboardInterrupt:
            print("detached", file=sys.stderr)
            return 0


def show_logs(name: str, output: Path) -> int:
    """Follow a run's log lines to its end."""
    connect(output)
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        run = find_flow_run(client, name)
        try:
            return follow(client, run.id)
        except KeyboardInterrupt:
            print("detached", file=sys.stderr)
            return 0
