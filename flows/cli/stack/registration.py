"""What the Prefect server of a stack knows: work pool, deployments, and the automations that reschedule lost runs."""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from flows.cli.stack.processes import last_line
from flows.cli.stack.stack import HOST_LIMIT, POOL, KeptOptions, StackOptions, read_heartbeat_seconds
from flows.subjects.dispatch import BULK_QUEUE
from tasks.errors import ConfigError, ServiceUnavailable
from tasks.redaction import register_secret
from tasks.stage.worker_process import SOURCE_ROOT

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

TAG = "likeness"
RUN_TAG = "likeness-run"
"""Of the main job alone: nobody wants a message of each look into an inbox."""
TAGGED = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
NOTIFIED = ("Completed", "Failed", "Cancelled", "Suspended")
NOTIFY_BLOCK, NOTIFY_VARIABLE = "likeness-notify", "LIKENESS_NOTIFY_URL"
RETRIES = 7
"""Of each request of a registration: the client waits 1, 2, 4 to 64 s between them."""
BULK_PRIORITY = 10  # the default queue has 1, and lower numbers are served first
HEARTBEATS = 3
"""Without as many, a run is lost. Fewer would mark living runs as crashed."""
# After these no heartbeat is due. Not Crashed: on SQLite the event of a crash is evaluated again, and the run scheduled
# again, where a second automation that matches it finds the database locked (prefect 3.8.8).
SILENT = ("Completed", "Failed", "Cancelled", "Scheduled", "Paused", "Suspended")


def register(environment: dict[str, str], options: StackOptions) -> None:
    """Register pool, deployments and automations; again with every `up`, since options of the form may be new."""
    log = options.folder / "logs" / "registration.log"
    # Surviving workers load the server while it is restarted; SQLite then answers 503, which the client tries again.
    environment = {"PREFECT_CLIENT_MAX_RETRIES": str(RETRIES), **environment}
    statements = [
        f"with r.open_client() as client: r.register_pool(client, {POOL!r}, 'process', max_runs={options.max_runs})",
        f"with r.open_client() as client: r.register_host(client, max_runs={options.max_runs})",
        f"with r.open_client() as client: r.register_queue(client, {POOL!r})",
        "r.register_automations()",
    ]
    secrets = {}
    if options.notify_url:
        notify = Notify.parse(options.notify_url)
        secrets = {NOTIFY_VARIABLE: notify.url}
        statements.append(f"r.register_notification({notify.kind!r})")
    run_code("\n".join(statements), {**environment, **secrets}, log=log)
    file = SOURCE_ROOT / "deployments" / "prefect.yaml"
    run_prefect(["--no-prompt", "deploy", "--all", "--prefect-file", str(file)], environment, log=log)


@dataclass(frozen=True)
class Notify:
    """Where messages about runs go."""

    url: str = field(repr=False)
    kind: Literal["slack", "webhook"]

    @classmethod
    def parse(cls, url: str) -> "Notify":
        """Return where an address leads: Slack by its host, else a webhook. Raises ConfigError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("--notify takes an http or https address")
        # Whoever knows the path can post. Not the host: it would hide every address on it, such as the stack's own.
        register_secret(url.partition(parts.netloc)[2].lstrip("/"))
        return cls(url, kind="slack" if parts.hostname == "hooks.slack.com" else "webhook")


def run_prefect(words: list[str], environment: dict[str, str], *, log: Path) -> None:
    """Run one command of Prefect."""
    run([sys.executable, "-m", "prefect", *words], environment, log=log)


def run_code(code: str, environment: dict[str, str], *, log: Path) -> None:
    """Run statements in a process of its own, which imports Prefect with the stack's environment."""
    run([sys.executable, "-c", f"from flows.cli.stack import registration as r\n{code}"], environment, log=log)


def run(command: list[str], environment: dict[str, str], *, log: Path) -> None:
    """Run a command in the checkout. Raises ServiceUnavailable with the last line of its output."""
    with log.open("ab") as file:
        done = subprocess.run(
            command, cwd=SOURCE_ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file,
            stderr=file, check=False,
        )  # fmt: skip
    if done.returncode:
        raise ServiceUnavailable(f"the Prefect server refused a registration: {last_line(log)}")


def open_client() -> "SyncPrefectClient":
    """Return a client of the configured server."""
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def register_pool(
    client: "SyncPrefectClient",
    name: str,
    kind: str,
    *,
    template: dict[str, Any] | None = None,
    max_runs: int | None = None,
) -> None:
    """Create a work pool, or update it by one request; what is None stays, or is Prefect's default for processes.

    Not by `prefect work-pool create --overwrite`, which removes the limit: until another command sets it, workers
    start all runs that wait. A paused pool stays paused.

    Raises:
        ConfigError: the pool has another type.

    """
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    values: dict[str, Any] = {"base_job_template": template or ProcessWorker.get_default_base_job_template()}
    values |= {} if max_runs is None else {"concurrency_limit": max_runs}
    try:
        client.create_work_pool(WorkPoolCreate.model_validate({"name": name, "type": kind, **values}))
    except ObjectAlreadyExists:
        found = client.read_work_pool(name).type
        if found != kind:
            raise ConfigError(f"work pool {name!r} has the type {found}; delete it, or choose another name") from None
        client.update_work_pool(name, WorkPoolUpdate.model_validate(values))


def register_host(client: "SyncPrefectClient", *, max_runs: int) -> None:
    """Create or update the concurrency limit of this host's trainings: its GPUs, or all runs where the CPU trains."""
    from tasks.stage.states import count_host_gpus  # imports Prefect

    client.upsert_global_concurrency_limit_by_name(os.environ[HOST_LIMIT], count_host_gpus() or max_runs)


def register_queue(client: "SyncPrefectClient", pool: str) -> None:
    """Create the queue of bulk runs, which workers of a pool serve after the default one."""
    from prefect.exceptions import ObjectAlreadyExists

    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_queue(BULK_QUEUE, work_pool_name=pool, priority=BULK_PRIORITY)


def register_notification(kind: str) -> None:
    """Create or update the automation that sends a message when a run ends or waits for a person.

    Runs in a process of its own: its address, which may hold a key, comes by the environment.

    Args:
        kind: `slack` for an incoming webhook of Slack or Mattermost, `webhook` for a POST of JSON.

    """
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.types import SecretDict
    from pydantic import SecretStr

    url = os.environ[NOTIFY_VARIABLE]
    block: CustomWebhookNotificationBlock | SlackWebhook
    if kind == "slack":
        block = SlackWebhook(url=SecretStr(url))
    else:
        body = {"subject": "{{subject}}", "text": "{{body}}"}
        # The address may hold a key: secrets are stored encrypted and never shown.
        block = CustomWebhookNotificationBlock(
            name=NOTIFY_BLOCK, url="{{address}}", json_data=body, secrets=SecretDict({"address": url})
        )
    block_id = block.save(NOTIFY_BLOCK, overwrite=True)
    assert isinstance(block_id, uuid.UUID)  # a coroutine only within an event loop
    put_automation(
        AutomationCore(
            name="likeness: notify when a run ends or waits for approval",
            trigger=EventTrigger(
                expect={f"prefect.flow-run.{state}" for state in NOTIFIED},
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related={"prefect.resource.id": f"prefect.tag.{RUN_TAG}", "prefect.resource.role": "tag"},
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[
                SendNotification(
                    block_document_id=block_id,
                    subject="likeness: {{ flow_run.name }} {{ flow_run.state.name }}",
                    body="{{ flow_run.state.message }} {{ flow_run|ui_url }}",
                )
            ],
        )
    )


def put_automation(automation: "AutomationCore") -> None:
    """Create an automation, in place of one of its name that is different.

    An equal one stays: with it would go what it waits for, such as a heartbeat of a run whose machine has just died.
    """
    with open_client() as client:
        found = client.read_automations_by_name(automation.name)
        if [describe_automation(old) for old in found] == [describe_automation(automation)]:
            return
        for old in found:
            client.delete_automation(old.id)
        client.create_automation(automation)


def describe_automation(automation: "AutomationCore") -> dict[str, Any]:
    """Return what an automation does, whether or not a person paused it."""
    plain = automation.model_dump(mode="json", include={"description", "trigger", "actions", "actions_on_trigger"})
    plain["trigger"].pop("id", None)
    # Sets come in any order.
    plain["trigger"] = {
        name: sorted(value, key=json.dumps) if isinstance(value, list) else value
        for name, value in plain["trigger"].items()
    }
    return plain


def find_heartbeat_window() -> datetime.timedelta:
    """Return after how long without a heartbeat a run is lost: runs send them as often as this environment says."""
    seconds = read_heartbeat_seconds() or KeptOptions().heartbeat_seconds
    return datetime.timedelta(seconds=HEARTBEATS * seconds)


def register_automations() -> None:
    """Create or update the automations of lost runs. Runs in a process of its own, with the stack's environment."""
    for automation in make_automations():
        put_automation(automation)


def make_automations() -> "tuple[AutomationCore, AutomationCore]":
    """Return the automations of runs without heartbeat, and of crashed runs.

    A run whose process is gone sends no heartbeat: it is marked Crashed, and a crashed one is scheduled again. Finished
    stages are cached and training resumes from its newest checkpoint, so nothing is computed or paid twice.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    lost = AutomationCore(
        name="likeness: mark runs without heartbeat as crashed",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in SILENT)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=TAGGED,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=find_heartbeat_window(),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat: its process is gone")],
    )
    crashed = AutomationCore(
        name="likeness: reschedule crashed runs",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=TAGGED,
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, message="rescheduled after a crash: it resumes")],
    )
    return lost, crashed
