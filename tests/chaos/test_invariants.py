"""The checker of campaigns can fail: each invariant is violated once, in evidence made by hand."""

from dataclasses import replace

import pytest

from tests.chaos.__main__ import name_places, parse
from tests.chaos.evidence import Change
from tests.chaos.faults import KINDS, SLUGS, Injected, plan_faults
from tests.chaos.invariants import Account, Answer, Evidence, RunOutcome, check
from tests.chaos.report import RunHistory, make_table

WEIGHTS = {"model/unet/a.safetensors": "1f", "model/text_encoder/b.safetensors": "2e"}
COMPLETED = RunOutcome("place-0/1", "COMPLETED", (), WEIGHTS, WEIGHTS)
ACCOUNT = Account(
    "place-0",
    answers=(Answer("aa", 10.0), Answer("bb", 11.0), Answer("bb", 12.0)),
    expected={"aa": 1, "bb": 2},
    paid={"judge": 3},
    expected_paid={"judge": 3},
)
GOOD = Evidence((COMPLETED,), (ACCOUNT,), (100.0,), {"gpu": 0}, True, (), ())


def check_run(**changes: object) -> list[str]:
    return check(replace(GOOD, runs=(replace(COMPLETED, **changes),)))  # type: ignore[arg-type]


def check_changed(**changes: object) -> list[str]:
    return check(replace(GOOD, **changes))  # type: ignore[arg-type]


def test_evidence_without_a_violation_passes() -> None:
    assert check(GOOD) == []


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "CANCELLING"])
def test_a_run_left_in_progress_is_a_violation_even_where_it_was_resumed(state: str) -> None:
    assert check_run(state=state, resume_codes=(0,)) == [f"run place-0/1 was left in state {state}"]


@pytest.mark.parametrize("codes", [(), (4,), (0, 4)])
def test_a_failed_run_that_cannot_be_resumed_is_a_violation(codes: tuple[int, ...]) -> None:
    found = check_run(state="FAILED", resume_codes=codes)
    assert found == [f"run place-0/1 ended FAILED and was not resumed (exit codes {list(codes)})"]
    assert check_run(state="FAILED", resume_codes=(*codes, 0)) == []


def test_weights_with_one_other_digest_are_a_violation() -> None:
    changed = {**WEIGHTS, "model/unet/a.safetensors": "1e"}
    [found] = check_run(weights=changed)
    assert found.endswith("differ from those of the undisturbed run: model/unet/a.safetensors")


def test_a_missing_or_additional_weights_file_is_a_violation() -> None:
    assert len(check_run(weights={"model/unet/a.safetensors": "1f"})) == 1
    assert len(check_run(weights={**WEIGHTS, "more.safetensors": "3d"})) == 1
    assert check_run(weights={}) == ["run place-0/1 left no weights"]


def test_a_run_without_an_undisturbed_twin_is_a_violation() -> None:
    assert len(check_run(weights=WEIGHTS, expected={})) == 1


def test_a_run_executed_twice_at_once_is_a_violation_and_twice_in_turn_is_none() -> None:
    assert check_run(finished=((10.0, 20.0), (20.0, 25.0))) == []
    assert check_run(finished=((19.0, 25.0), (10.0, 20.0))) == ["run place-0/1 was executed twice at once"]


def test_a_question_that_is_answered_once_too_often_is_a_violation() -> None:
    again = replace(ACCOUNT, answers=(*ACCOUNT.answers, Answer("aa", 50.0)))
    [found] = check_changed(accounts=(again,))
    assert found == "place-0: question aa was answered more often than without faults"


def test_an_answer_right_before_a_fault_may_be_lost_and_asked_again() -> None:
    again = replace(ACCOUNT, answers=(*ACCOUNT.answers, Answer("aa", 99.0)))
    assert check_changed(accounts=(again,)) == []
    assert len(check_changed(accounts=(again,), fault_times=(98.0,))) == 1
    assert len(check_changed(accounts=(again,), fault_times=(103.0,))) == 1


def test_a_ledger_with_one_paid_call_too_many_is_a_violation() -> None:
    [found] = check_changed(accounts=(replace(ACCOUNT, paid={"judge": 4}),))
    assert found == "place-0: the ledgers hold 4 paid calls of the judge, 3 are needed"
    assert len(check_changed(accounts=(replace(ACCOUNT, paid={"judge": 3, "captioner": 1}),))) == 1


def test_a_leaked_slot_is_a_violation() -> None:
    assert check_changed(active_slots={"gpu": 1}) == ["concurrency limit gpu still has 1 slots in use"]
    assert check_changed(active_slots={}) == ["the server has no concurrency limit, so that none could leak"]
    assert check_changed(pool_accepts_runs=False) == ["the work pool took no run after all others had ended"]


def test_an_orphan_process_and_a_temporary_file_are_violations() -> None:
    assert len(check_changed(orphans=("python -m tasks.training.process.worker",))) == 1
    assert len(check_changed(temporary_files=("runs/store/.part-x",))) == 1


def test_a_schedule_follows_from_its_seed_and_holds_every_kind_equally_often() -> None:
    kinds = tuple(KINDS)
    planned = plan_faults(5, 2 * len(kinds), kinds)
    assert planned == plan_faults(5, 2 * len(kinds), kinds)
    assert planned != plan_faults(6, 2 * len(kinds), kinds)
    assert {kind: [fault.kind for fault in planned].count(kind) for kind in kinds} == dict.fromkeys(kinds, 2)


def test_options_name_kinds_and_give_every_kind_of_place_an_undisturbed_one() -> None:
    options = parse(["--runs", "5", "--kinds", "flow,s3-503"])
    assert options.kinds == (SLUGS["flow"], SLUGS["s3-503"])
    assert name_places(options) == {
        "undisturbed-s3": "s3", "undisturbed-local": "local", "place-0": "s3", "place-1": "local", "place-2": "s3",
    }  # fmt: skip


def test_the_table_names_how_runs_recovered_and_blames_the_last_fault_before_a_crash() -> None:
    faults = [Injected("S3 answers 503", 10, 15, ("r1", "r2")), Injected("flow process killed", 20, 20, ("r1",))]
    crashed = (Change(5, "RUNNING"), Change(22, "CRASHED"), Change(24, "SCHEDULED"), Change(30, "RUNNING"))
    histories = {
        "r1": RunHistory((*crashed, Change(50, "COMPLETED")), ()),
        "r2": RunHistory((Change(5, "RUNNING"), Change(12, "FAILED")), ((60, 70),)),
    }
    table = make_table(faults, histories).splitlines()
    assert table[2:] == [
        "| S3 answers 503 | 1 | 2 | 1 continued, 1 `likeness resume` | 60 s (60 s) |",
        "| flow process killed | 1 | 1 | 1 rescheduled | 10 s (10 s) |",
    ]
    alive = RunHistory(
        (Change(5, "RUNNING"), Change(22, "CRASHED"), Change(24, "SCHEDULED"), Change(50, "COMPLETED")), ()
    )
    assert "1 continued" in make_table(faults[1:], {"r1": alive}), "its clock was off: the process lived and finished"
    for later in ((), (Change(30, "RUNNING"), Change(40, "FAILED"))):
        never = {"r1": RunHistory((Change(5, "RUNNING"), Change(22, "CRASHED"), *later), ())}
        assert "1 not recovered" in make_table(faults[1:], never)
