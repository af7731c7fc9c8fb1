"""Tracking of a sweep's trials by a server that is down until the sweep has ended."""

from pathlib import Path

import pytest

from conf.request import RunRequest
from conf.sweep import read_sweep
from flows.sweep_settings import run_sweep
from flows.sweeps.study import SweepStudy
from flows.sweeps.tracking import UNTRACKED, list_untracked, summarize_seeds
from tasks.errors import ServiceUnavailable
from tasks.manifests.run_summary import RunSummary
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tests.support.summary import make_measured_summary
from tests.support.sweep import RATE, FakeRuns, compile_base, sweep, sweep_request


def test_trials_that_an_outage_left_are_sent_when_the_sweep_is_run_again(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"output_dir={tmp_path}", f"tracking.uri=http://127.0.0.1:{free_port}", f"{RATE}=1e-4,2e-4"]
    request = read_sweep(words, {"study": "outage"})
    sweep(request, FakeRuns())
    shown = "".join(capsys.readouterr())
    assert "warning: 2 trials of outage are not tracked: tracking at http://127.0.0.1:" in shown
    assert "does not answer" in shown
    down = compile_base(request.base.model_dump_json())
    up = down.model_copy(update={"tracking": down.tracking.model_copy(update={"uri": ""})})
    runs = FakeRuns()
    for _ in range(2):  # the second time nothing is left to send
        run_sweep(request, up, runs)
    assert runs.requests == []
    assert "not tracked" not in "".join(capsys.readouterr())
    tracker = MlflowTracker(up.tracking, folder=tmp_path)
    [parent] = tracker.find_runs("likeness.kind", "sweep")
    trials = tracker.find_runs("likeness.kind", "trial")
    assert sorted(run.data.metrics["tuned/dino"] for run in trials) == [1e-4, 2e-4]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *trials]} == {"FINISHED"}


def test_seeds_alone_are_tracked_as_one_trial_with_the_means(tmp_path: Path) -> None:
    request = read_sweep([f"output_dir={tmp_path}", "seed=4"], {"num_seeds": 3})
    config = compile_base(request.base.model_dump_json())
    run_sweep(request, config, FakeRuns(lambda values, seed: 0.1 * seed))
    tracker = MlflowTracker(config.tracking, folder=tmp_path)
    [trial] = tracker.find_runs("likeness.kind", "trial")
    assert trial.data.metrics["tuned/dino"] == pytest.approx(0.5)
    # Seeds 4, 5, 6: a standard deviation of 0.1, and 4.303 of Student's t with two degrees of freedom.
    assert trial.data.metrics["tuned/dino_high"] == pytest.approx(0.5 + 4.303 * 0.1 / 3**0.5, abs=1e-3)
    assert trial.data.metrics["tuned/dino_low"] == pytest.approx(0.5 - 4.303 * 0.1 / 3**0.5, abs=1e-3)
    assert "tuned/clip_i_low" not in trial.data.metrics, "equal values say nothing of other seeds"
    assert trial.data.params == {}
    [parent] = tracker.find_runs("likeness.kind", "sweep")
    assert parent.info.run_name == request.study_name


def test_a_trial_of_one_seed_has_the_intervals_of_its_run() -> None:
    rows = {name: value for name, value, _ in summarize_seeds([make_measured_summary("a")])}
    assert rows == {
        "tuned/dino": 0.714, "tuned/dino_low": 0.661, "tuned/dino_high": 0.749,
        "tuned/clip_i": 0.6, "tuned/clip_t": 0.3,
    }  # fmt: skip


def finish_trials_alone(self: MlflowTracker, *, is_failed: bool) -> None:
    if self.parent_run_id is None:  # of the sweep, not of a trial
        raise ServiceUnavailable("tracking does not answer")


def test_a_parent_run_that_stayed_open_is_closed_by_the_next_sweep_of_its_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request, other = (
        read_sweep([f"output_dir={tmp_path}", f"{RATE}={rates}"], {"study": study})
        for study, rates in (("one", "1e-4,2e-4"), ("other", "3e-4,4e-4"))
    )
    config = compile_base(request.base.model_dump_json())
    tracker = MlflowTracker(config.tracking, folder=tmp_path)
    runs = FakeRuns()

    def interrupt(request: RunRequest) -> RunSummary:
        if len(runs.requests) == 1:
            raise KeyboardInterrupt
        return runs(request)

    def list_statuses() -> list[str]:
        return sorted(run.info.status for run in tracker.find_runs("likeness.kind", "sweep"))

    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "finish", finish_trials_alone)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(request, config, interrupt)
        assert "the same sweep, run again, closes it" in "".join(capsys.readouterr())
        assert list_statuses() == ["RUNNING"]
        run_sweep(request, config, FakeRuns())  # its last trial, as a child of a parent of its own
        assert list_statuses() == ["KILLED", "RUNNING"]
    run_sweep(other, config, FakeRuns())
    assert list_statuses() == ["FINISHED", "KILLED", "RUNNING"]
    for _ in range(2):  # all trials have run; the second time nothing is left to close
        run_sweep(request, config, FakeRuns())
        assert list_statuses() == ["FINISHED", "FINISHED", "KILLED"]


def test_a_damaged_record_of_an_untracked_trial_costs_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = SweepStudy(sweep_request(tmp_path, f"{RATE}=1e-4,2e-4"), tmp_path / "sweeps", seed=0)
    whole = {"number": 1, "name": "run-1", "params": {}, "rows": [["objective", 0.5, 0]], "ended_ms": 1}
    study.study.set_user_attr(f"{UNTRACKED}0", {"number": "zero"})
    study.study.set_user_attr(f"{UNTRACKED}1", whole)
    assert [row.number for row in list_untracked(study)] == [1]
    assert "attribute untracked-0 is damaged" in "".join(capsys.readouterr())
