"""Pruning on the validation of a training, as its worker reports it."""

from pathlib import Path

import pytest

from conf.compose import compile_request
from conf.request import RunRequest
from flows.sweeps.pruning import ValidationTail
from flows.sweeps.study import SweepStudy
from tasks.stage.digests import dump_line
from tests.support.sweep import RATE, VALIDATED, FakeRuns, Trainings, begin_training, sweep, sweep_request


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.sweep_settings.draw_plots", lambda study: [])


@pytest.mark.parametrize("objective", ["dino:min", "dino:max"])
def test_a_trial_behind_the_median_is_pruned_at_its_first_validation(tmp_path: Path, objective: str) -> None:
    words = (f"{RATE}=0.1,0.11,0.12,0.9,0.05", VALIDATED)
    request = sweep_request(tmp_path, *words, pruner="median", objectives=[objective])
    outcome = sweep(request, Trainings())
    pruned = [trial for trial in outcome.trials if trial.status == "pruned"]
    # Enqueued in this order; a low loss is good whatever the objective's direction.
    assert [trial.settings[RATE] for trial in pruned] == [0.9]
    assert pruned[0].error == "pruned at step 2: its validation is behind the median of earlier trials"
    assert "pruned at step 2" in Path(outcome.report).read_text()
    reported = SweepStudy(request, tmp_path / "sweeps", seed=23).trials("COMPLETE")[0].intermediate_values
    assert list(reported) == [2, 4]  # the last step ends the training anyhow


def test_nothing_is_pruned_without_a_pruner(tmp_path: Path) -> None:
    outcome = sweep(sweep_request(tmp_path, f"{RATE}=0.1,0.11,0.12,0.9,0.05", VALIDATED), Trainings())
    assert {trial.status for trial in outcome.trials} == {"complete"}


def test_a_pruned_trial_counts_as_done(tmp_path: Path) -> None:
    request = sweep_request(tmp_path, f"{RATE}=0.1,0.11,0.12,0.9", VALIDATED, pruner="median")
    runs = Trainings()
    assert sweep(request, runs).num_new_trials == 4
    assert sweep(request, runs).num_new_trials == 0


def test_only_complete_lines_with_validation_are_passed_on(tmp_path: Path) -> None:
    request = RunRequest(settings={"output_dir": str(tmp_path)})
    config = compile_request(request)
    seen: list[tuple[int, float, float | None]] = []

    def note(step: int, loss: float, similarity: float | None) -> bool:
        seen.append((step, loss, similarity))
        return step == 6

    tail = ValidationTail(config, note)
    assert not tail.read()  # no such run yet
    events = begin_training(config, request, key="k")
    line = dump_line({"event": "step", "step": 4, "validation_loss": 0.5, "validation_similarity": 0.25})
    with events.open("a") as file:
        file.write(dump_line({"event": "step", "step": 2, "loss": 1.0}) + "damaged\n" + line[:10])
        file.flush()
        assert not tail.read()
        assert seen == []
        file.write(line[10:])
        file.write(dump_line({"event": "step", "step": 6, "validation_loss": None}))
        file.flush()
        assert not tail.read()
        assert seen == [(4, 0.5, 0.25)]
        file.write(dump_line({"event": "step", "step": 6, "validation_loss": 0.25}))
        file.flush()
        assert tail.read()
    assert tail.reason.startswith("pruned at step 6")


def test_the_similarity_counts_where_it_is_measured(tmp_path: Path) -> None:
    from flows.sweeps.runners import LocalRunner
    from flows.sweeps.trials import Trials

    request = sweep_request(tmp_path, f"{RATE}=0.1,0.2", VALIDATED, pruner="median", objectives=["dino"])
    study = SweepStudy(request, tmp_path / "sweeps", seed=1)
    config = compile_request(request.base)
    trials = Trials(study, LocalRunner(FakeRuns()), config, on_complete=lambda trial, summaries: None)
    taken = study.ask()
    assert taken is not None
    trials.make_pruning(taken[0])(2, 9.0, 0.75)
    assert study.trials("RUNNING")[0].intermediate_values == {2: 0.75}
