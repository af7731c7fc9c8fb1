"""Pool and automations, as the server gets them."""

import copy
import uuid
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.events.schemas.automations import EventTrigger
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cli.stack import registration
from flows.cli.stack.registration import make_automations, register_pool, register_queue
from flows.cli.stack.stack import POOL, StackOptions
from flows.subjects.dispatch import BULK_QUEUE
from tasks.errors import ConfigError
from tasks.redaction import redact


def test_no_event_of_a_run_belongs_to_both_automations() -> None:
    lost, crashed = (each.trigger for each in make_automations())
    assert isinstance(lost, EventTrigger)
    assert isinstance(crashed, EventTrigger)
    assert crashed.expect == {"prefect.flow-run.Crashed"}
    assert not lost.expect & crashed.expect
    # A run that waits for its next attempt, or has ended, sends no heartbeat.
    waiting = {f"prefect.flow-run.{state}" for state in ("Scheduled", "Completed", "Failed", "Cancelled", "Suspended")}
    assert waiting < lost.expect


def test_a_pool_that_exists_never_lacks_its_limit_and_stays_paused(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that survived the server would start every waiting run within the seconds until it is set again."""
    register_pool(client, POOL, "process", max_runs=2)
    first = client.read_work_pool(POOL)
    assert first.concurrency_limit == 2
    assert first.base_job_template["variables"]["properties"]
    client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))
    sent: list[Any] = []
    plain = client.request
    monkeypatch.setattr(
        client, "request", lambda *words, **named: (sent.append(named.get("json")), plain(*words, **named))[1]
    )
    register_pool(client, POOL, "process", max_runs=3)
    again = client.read_work_pool(POOL)
    assert (again.id, again.concurrency_limit, again.is_paused) == (first.id, 3, True)
    changes = [body for body in sent if body]
    assert changes
    assert all(body["concurrency_limit"] == 3 for body in changes)
    template = copy.deepcopy(first.base_job_template)
    template["variables"]["properties"]["name"]["description"] = "mine"
    register_pool(client, POOL, "process", template=template)
    kept = client.read_work_pool(POOL)
    assert (kept.concurrency_limit, kept.base_job_template) == (3, template)
    with pytest.raises(ConfigError, match="work pool 'likeness' has the type process; delete it"):
        register_pool(client, POOL, "docker", template=template)


def test_runs_of_many_subjects_wait_behind_single_runs_and_are_served_in_the_order_of_their_submission(
    client: SyncPrefectClient,
) -> None:
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    register_pool(client, pool, "process")
    for _ in range(2):  # as every `likeness up` does
        register_queue(client, pool)
    flow = client.create_flow_from_name("a-flow")
    deployment = client.create_deployment(flow, name=pool, work_pool_name=pool, enforce_parameter_schema=False)

    def submit(name: str, queue: str | None = None) -> None:
        client.create_flow_run_from_deployment(deployment, name=name, work_queue_name=queue)

    # Two batches of two; the person's run comes last.
    for name in ("a1", "a2", "b1", "b2"):
        submit(name, BULK_QUEUE)
    submit("single")

    def list_served() -> list[str]:
        """Return what the server hands to a worker that asks for runs."""
        return [each.flow_run.name for each in client.get_scheduled_flow_runs_for_work_pool(pool)]

    assert list_served() == ["single", "a1", "a2", "b1", "b2"]
    register_pool(client, pool, "process", max_runs=2)
    assert list_served() == ["single", "a1"]


def test_registration_changes_the_pool_by_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    monkeypatch.setattr(registration, "run", lambda command, environment, *, log: commands.append(" ".join(command)))
    registration.register({}, StackOptions(tmp_path, 0, 0, 0, max_runs=4))
    assert sum("register_pool" in command for command in commands) == 1
    assert not [command for command in commands if "work-pool" in command]
    assert any("max_runs=4)" in command for command in commands)


def test_an_automation_that_is_the_same_stays_with_what_it_waits_for(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one would wait for no heartbeat of the runs that died with their machine before this `likeness up`."""

    def register(frequency: int) -> list[Any]:
        monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(frequency))
        with temporary_settings({PREFECT_API_URL: str(client.api_url)}):
            for automation in make_automations():
                registration.put_automation(automation)
        return [found for each in make_automations() for found in client.read_automations_by_name(each.name)]

    try:
        first, again = register(180), register(180)
        assert len(first) == 2
        assert [each.id for each in again] == [each.id for each in first]
        [lost, crashed] = register(30)  # other heartbeats: another window
    finally:  # they would act on the runs of other tests
        for automation in make_automations():
            for made in client.read_automations_by_name(automation.name):
                client.delete_automation(made.id)
    assert isinstance(lost.trigger, EventTrigger)
    assert lost.trigger.within.total_seconds() == 90
    assert lost.id != first[0].id
    assert crashed.id == first[1].id


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://hooks.slack.com/services/T0/B0/key", "slack"),
        ("https://hooks.slack.com.example.org/x", "webhook"),
        ("http://127.0.0.1:8065/hooks/key", "webhook"),
    ],
)
def test_an_address_for_messages_is_slacks_by_its_host(url: str, kind: str) -> None:
    assert registration.Notify.parse(url).kind == kind


def test_the_path_of_an_address_for_messages_is_hidden_and_its_host_is_not() -> None:
    url = "http://127.0.0.1:8065/hooks/k3y-of-a-channel-9f8e7d"
    registration.Notify.parse(url)
    assert "k3y-of-a" not in redact(f"POST {url} failed")
    assert redact("http://127.0.0.1:4200/api") == "http://127.0.0.1:4200/api"


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")  # of slack_sdk, by Apprise, which Prefect posts with
@pytest.mark.parametrize("kind", ["slack", "webhook"])
def test_messages_are_registered_once_and_stay(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv(registration.NOTIFY_VARIABLE, "https://hooks.slack.com/services/T0/B0/key")
    name = "likeness: notify when a run ends or waits for approval"
    found = []
    with temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        for _ in range(2):
            registration.register_notification(kind)
            found.append(client.read_automations_by_name(name))
    [first], [second] = found
    assert first.id == second.id
    client.delete_automation(first.id)
    block = client.read_block_document_by_name(
        registration.NOTIFY_BLOCK,
        "slack-webhook" if kind == "slack" else "custom-webhook",
        include_secrets=False,
    )
    assert "T0/B0/key" not in str(block.data)
    client.delete_block_document(block.id)
