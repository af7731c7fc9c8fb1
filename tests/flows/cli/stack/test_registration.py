"""The automations of lost runs, as the server gets them."""

from prefect.events.schemas.automations import EventTrigger

from flows.cli.stack.registration import make_automations


def test_no_event_of_a_run_belongs_to_both_automations() -> None:
    lost, crashed = (each.trigger for each in make_automations())
    assert isinstance(lost, EventTrigger)
    assert isinstance(crashed, EventTrigger)
    assert crashed.expect == {"prefect.flow-run.Crashed"}
    assert not lost.expect & crashed.expect
    # A run that waits for its next attempt, or has ended, sends no heartbeat.
    waiting = {f"prefect.flow-run.{state}" for state in ("Scheduled", "Completed", "Failed", "Cancelled", "Suspended")}
    assert waiting < lost.expect
