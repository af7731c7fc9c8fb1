"""Trials of a study on real Optuna, with a cheap function in place of whole runs."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.compose import compile_request
from conf.request import RunRequest, Value
from conf.sweep import SweepRequest
from flows.runs.context import make_run_folder
from flows.sweeps.outcome import estimate_metrics
from flows.sweeps.study import OWNER, SweepStudy
from tasks.errors import ConfigError, TrainingFailed
from tasks.manifests.run_summary import ProcessOwner, RunSummary
from tasks.services.llm.budget.ledger import Ledger, LedgerRow
from tasks.services.store.lease import find_start, read_boot
from tests.support.sweep import RATE, STEPS, FakeRuns, interrupt_after, sweep, sweep_request

RANGES = (f"{RATE}=1e-6..1e-2:log", f"{STEPS}=10..50:10")


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own; its plots take seconds."""
    monkeypatch.setattr("flows.sweep_settings.draw_plots", lambda study: [])


def values_of(runs: FakeRuns) -> list[tuple[Value, ...]]:
    return runs.settings(RATE, STEPS)


def open_study(request: SweepRequest) -> SweepStudy:
    return SweepStudy(request, Path(str(request.base.settings["output_dir"])) / "sweeps", seed=23)


@pytest.fixture
def other_process() -> Iterator[ProcessOwner]:
    """A process that is alive until the test ends."""
    import socket

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = find_start(process.pid)
    yield ProcessOwner(host=socket.gethostname(), pid=process.pid, started=started, boot=read_boot())
    process.communicate(b"\n")


def test_a_grid_tries_every_combination_of_values_and_steps_once(tmp_path: Path) -> None:
    runs = FakeRuns()
    outcome = sweep(sweep_request(tmp_path, f"{RATE}=1e-5,1e-4", f"{STEPS}=10..30:10"), runs)
    assert sorted(values_of(runs)) == [(rate, steps) for rate in (1e-5, 1e-4) for steps in (10, 20, 30)]
    assert outcome.best[0].settings[RATE] == 1e-4
    assert outcome.ended_by == "6 of 6 trials are done"


def test_an_explicit_grid_is_limited_by_the_number_of_trials(tmp_path: Path) -> None:
    runs = FakeRuns()
    sweep(sweep_request(tmp_path, "seed=1..6", sampler="grid", num_trials=2), runs)
    assert len(runs.requests) == 2


def test_samples_of_a_range_lie_on_its_scale_and_steps(tmp_path: Path) -> None:
    runs = FakeRuns()
    sweep(sweep_request(tmp_path, *RANGES, "training.ema_decay=0..0.9:0.3", num_trials=12, sampler="random"), runs)
    rates = [float(str(rate)) for rate, _ in values_of(runs)]
    assert all(1e-6 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 1e-4 for rate in rates) >= 3  # half of them on a logarithmic scale, 1 in 100 on a linear one
    assert {steps for _, steps in values_of(runs)} <= {10, 20, 30, 40, 50}
    assert {value for (value,) in runs.settings("training.ema_decay")} <= {0.0, 0.3, 0.6, 0.9}


def test_lists_and_texts_are_values_to_try(tmp_path: Path) -> None:
    runs = FakeRuns(lambda values, seed: 1.0)
    sweep(sweep_request(tmp_path, "training.lora.target_modules=[to_q],[to_k,to_v]", "training.optimizer=adamw"), runs)
    assert [value for (value,) in runs.settings("training.lora.target_modules")] == [["to_q"], ["to_k", "to_v"]]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_a_sampler_is_reproducible_and_follows_the_seed(tmp_path: Path, sampler: str) -> None:
    tables = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs = FakeRuns()
        sweep(sweep_request(tmp_path / name, *RANGES, f"seed={seed}", num_trials=14, sampler=sampler), runs)
        tables.append(values_of(runs))
    assert tables[0] == tables[1] != tables[2]
    assert len(set(tables[0])) > 7  # each trial is sampled anew


def test_samplers_differ_in_what_they_sample(tmp_path: Path) -> None:
    tables = {}
    for sampler in ("tpe", "random", "nsga2"):
        runs = FakeRuns()
        sweep(sweep_request(tmp_path / sampler, *RANGES, num_trials=24, sampler=sampler), runs)
        tables[sampler] = values_of(runs)
    assert tables["tpe"][:10] != tables["tpe"][10:20]
    assert len({str(table) for table in tables.values()}) == 3
    rates = {sampler: [float(str(rate)) for rate, _ in table[12:]] for sampler, table in tables.items()}
    # TPE has found by then that a high rate is good.
    assert sum(rates["tpe"]) > sum(rates["random"])


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_an_interrupted_sweep_resumes_with_what_an_uninterrupted_one_samples(tmp_path: Path, sampler: str) -> None:
    whole, parts = FakeRuns(), FakeRuns()
    sweep(sweep_request(tmp_path / "whole", *RANGES, num_trials=16, sampler=sampler), whole)
    request = sweep_request(tmp_path / "parts", *RANGES, num_trials=16, sampler=sampler)
    with pytest.raises(KeyboardInterrupt):
        sweep(request, interrupt_after(13, parts))
    outcome = sweep(request, parts)
    assert values_of(parts) == values_of(whole)
    assert [trial.status for trial in outcome.trials].count("interrupted") == 1


def test_a_trial_of_a_killed_process_is_failed_and_repeated(tmp_path: Path) -> None:
    request = sweep_request(tmp_path, *RANGES, num_trials=3, sampler="random")
    taken = open_study(request).ask()
    assert taken is not None
    trial, values = taken
    gone = ProcessOwner(host=ProcessOwner.model_validate(trial.user_attrs[OWNER]).host, pid=2**22 - 1, started=1.0)
    trial.set_user_attr(OWNER, gone.model_dump())
    runs = FakeRuns()
    outcome = sweep(request, runs)
    assert runs.settings(*values)[0] == tuple(values.values())
    assert outcome.trials[0].status == "interrupted"
    assert len(runs.requests) == 3


def test_a_trial_of_a_living_process_is_left_to_it(tmp_path: Path, other_process: ProcessOwner) -> None:
    request = sweep_request(tmp_path, "seed=1,2")
    taken = open_study(request).ask()
    assert taken is not None
    taken[0].set_user_attr(OWNER, other_process.model_dump())
    runs = FakeRuns(lambda values, seed: seed)
    outcome = sweep(request, runs)
    assert runs.settings("seed") == [({1: 2, 2: 1}[int(str(taken[1]["seed"]))],)]
    assert len(outcome.trials) == 1
    assert [trial.number for trial in open_study(request).trials("RUNNING")] == [taken[0].number]


def test_a_journal_with_a_torn_last_line_resumes(tmp_path: Path) -> None:
    runs = FakeRuns()
    outcome = sweep(sweep_request(tmp_path, *RANGES, num_trials=2, study="torn"), runs)
    with Path(outcome.journal).open("a") as file:
        file.write('{"op_code": 4, "work')
    assert len(sweep(sweep_request(tmp_path, *RANGES, num_trials=4, study="torn"), runs).trials) == 4
    assert len(runs.requests) == 4


def test_a_finished_sweep_runs_nothing_again(tmp_path: Path) -> None:
    request, runs = sweep_request(tmp_path, f"{RATE}=1e-5,1e-4"), FakeRuns()
    assert sweep(request, runs).num_new_trials == 2
    again = sweep(request, runs)
    assert again.num_new_trials == 0
    assert len(runs.requests) == 2
    assert len(again.trials) == 2


def test_a_failed_trial_is_kept_with_its_reason_and_repeated_by_the_next_sweep(tmp_path: Path) -> None:
    request, runs = sweep_request(tmp_path, f"{RATE}=1e-5,1e-4"), FakeRuns()

    def fail(run: RunRequest) -> RunSummary:
        if run.settings[RATE] == 1e-4:
            raise TrainingFailed("loss was not finite in 4 steps")
        return runs(run)

    outcome = sweep(request, fail)
    failed = [trial for trial in outcome.trials if trial.status == "failed"]
    assert [trial.error for trial in failed] == ["loss was not finite in 4 steps"]
    assert failed[0].settings == {RATE: 1e-4}
    assert "loss was not finite in 4 steps" in Path(outcome.report).read_text()
    assert [t.user_attrs["error"] for t in open_study(request).trials("FAIL")] == ["loss was not finite in 4 steps"]
    assert sweep(request, runs).best[0].settings == {RATE: 1e-4}


def test_a_sweep_without_a_complete_trial_says_why(tmp_path: Path) -> None:
    def fail(run: RunRequest) -> RunSummary:
        raise TrainingFailed("no gradient")

    with pytest.raises(ConfigError, match="no trial of sweep-.* finished: no gradient"):
        sweep(sweep_request(tmp_path, "seed=1,2"), fail)


def test_a_sampled_search_ends_after_five_failures_in_a_row(tmp_path: Path) -> None:
    runs = FakeRuns()

    def fail(run: RunRequest) -> RunSummary:
        if len(runs.requests) >= 1:
            runs.requests.append(run)
            raise TrainingFailed("no gradient")
        return runs(run)

    outcome = sweep(sweep_request(tmp_path, *RANGES, num_trials=50), fail)
    assert outcome.ended_by == "5 trials in a row failed"
    assert len(runs.requests) == 6


def test_the_objective_is_the_named_figure_in_its_direction(tmp_path: Path) -> None:
    def best(*words: str, formula: object = None, **options: object) -> Value:
        folder = tmp_path / str(abs(hash(str(options))))
        return sweep(sweep_request(folder, f"{RATE}=0.1,0.3,0.2", **options), FakeRuns()).best[0].settings[RATE]

    assert best(objectives=["metrics.tuned.dino"]) == 0.3
    assert best(objectives=["dino:min"]) == 0.1
    assert best(objectives=["prompt_following"]) == 0.1
    assert best(objectives=["dino_x_clip_t"]) == 0.3
    assert best(objectives=["wall_seconds"]) == 0.1  # the first run is the shortest
    assert best(objectives=["stages.training.seconds:max"]) == 0.2


def test_an_objective_that_is_not_measured_ends_the_sweep_after_one_trial(tmp_path: Path) -> None:
    runs = FakeRuns()
    for name in ("div", "stages.training.counts.stepz"):
        with pytest.raises(ConfigError, match="was not measured by run"):
            sweep(sweep_request(tmp_path / name, f"{RATE}=0.1,0.3", objectives=[name]), runs)
    assert len(runs.requests) == 2


def test_two_objectives_give_a_pareto_front(tmp_path: Path) -> None:
    runs = FakeRuns()
    request = sweep_request(tmp_path, f"{RATE}=0.3,0.2,0.1,0.4", objectives=["dino", "wall_seconds"])
    outcome = sweep(request, runs)
    # The second and third run are worse and slower than the first.
    order = [float(str(rate)) for (rate,) in runs.settings(RATE)]
    expected = {rate for index, rate in enumerate(order) if rate > max(order[:index], default=0.0)}
    assert {trial.settings[RATE] for trial in outcome.best} == expected
    assert all(len(trial.values) == 2 for trial in outcome.trials)
    assert len(outcome.commands) == len(outcome.best)


def test_each_setting_runs_with_several_seeds_and_the_objective_is_their_mean(tmp_path: Path) -> None:
    runs = FakeRuns(lambda values, seed: float(str(values[RATE])) + seed)
    outcome = sweep(sweep_request(tmp_path, f"{RATE}=0.1,0.3", "seed=5", num_seeds=3, objectives=["dino"]), runs)
    assert [request.seed for request in runs.requests] == [5, 6, 7, 5, 6, 7]
    best = outcome.best[0]
    assert best.values == [pytest.approx(6.3)]
    # Of 5.3, 6.3, 7.3: the mean and 4.303 (Student's t, two degrees of freedom) / sqrt(3).
    assert best.intervals[0] == (pytest.approx(6.3 - 2.4841, abs=1e-3), pytest.approx(6.3 + 2.4841, abs=1e-3))
    assert len(best.run_ids) == 3
    assert best.cached_stages == {"prior": 3 if best.trial else 2, "training": 0}
    assert best.cost_usd == 0.75


def test_seeds_alone_repeat_one_setting_and_keep_every_metric(tmp_path: Path) -> None:
    runs = FakeRuns(lambda values, seed: 0.1 * seed)
    request = sweep_request(tmp_path, f"{RATE}=0.2", "seed=5", num_seeds=3)
    outcome = sweep(request, runs)
    assert [run.seed for run in runs.requests] == [5, 6, 7]
    assert {run.settings[RATE] for run in runs.requests} == {0.2}
    [best] = outcome.best
    assert best.seeds == [5, 6, 7]
    rows = {row.name: row for row in estimate_metrics(best)}
    dino = rows["DINO"]
    assert dino.values == pytest.approx([0.5, 0.6, 0.7])
    assert dino.mean == pytest.approx(0.6)
    # 4.303 (Student's t, two degrees of freedom) x 0.1 / sqrt(3)
    assert dino.interval == pytest.approx((0.6 - 0.24841, 0.6 + 0.24841), abs=1e-3)
    assert rows["judge: prompt"].mean == pytest.approx(3.4)
    assert rows["CLIP-T"].interval is None  # equal values say nothing of others
    assert "DIV" not in rows  # not measured
    assert sweep(request, runs).num_new_trials == 0
    assert len(runs.requests) == 3


def test_interrupted_seeds_are_repeated_with_the_runs_that_are_left(tmp_path: Path) -> None:
    request, runs = sweep_request(tmp_path, "seed=5", num_seeds=3), FakeRuns(lambda values, seed: seed)
    with pytest.raises(KeyboardInterrupt):
        sweep(request, interrupt_after(3, runs))
    outcome = sweep(request, runs)
    # The first two are finished runs by then, whose stages are cached.
    assert [run.seed for run in runs.requests] == [5, 6, 5, 6, 7]
    assert outcome.best[0].metrics["dino"] == [5, 6, 7]


def test_a_single_seed_has_no_interval(tmp_path: Path) -> None:
    assert sweep(sweep_request(tmp_path, "seed=1,2"), FakeRuns()).best[0].intervals == []


def test_no_trial_starts_once_the_cost_limit_is_reached(tmp_path: Path) -> None:
    runs = FakeRuns()
    request = sweep_request(tmp_path, *RANGES, max_usd=0.6)
    outcome = sweep(request, runs)
    assert len(runs.requests) == 3  # 0.25 and 0.50 are below it
    assert outcome.ended_by == "--usd 0.6 are spent (0.75000)"
    assert outcome.cost_usd == 0.75
    assert sweep(request, runs).num_new_trials == 0  # the limit is the study's


def test_the_cost_of_a_failed_run_counts(tmp_path: Path) -> None:
    runs = FakeRuns()

    def fail(run: RunRequest) -> RunSummary:
        config = compile_request(run)
        folder = make_run_folder(tmp_path, config, run, is_trusted=True)
        row = LedgerRow(role="judge", profile="p", requested_model="m", outcome="ok", cost_usd=0.5)
        Ledger(folder / "ledger.jsonl").record(row)
        if not runs.requests:
            runs(run)
            raise TrainingFailed("no gradient")
        return runs(run)

    outcome = sweep(sweep_request(tmp_path, *RANGES, max_usd=0.7), fail)
    assert [(trial.status, trial.cost_usd) for trial in outcome.trials] == [("failed", 0.5), ("complete", 0.25)]
    assert outcome.cost_usd == 0.75


def test_an_unknown_price_ends_a_sweep_with_a_cost_limit(tmp_path: Path) -> None:
    runs = FakeRuns()

    def unpriced(run: RunRequest) -> RunSummary:
        return runs(run).model_copy(update={"cost_usd": None})

    outcome = sweep(sweep_request(tmp_path, *RANGES, max_usd=0.6), unpriced)
    assert len(runs.requests) == 1
    assert "the price of a trial is unknown" in outcome.ended_by


def test_no_trial_starts_once_the_hours_are_used(tmp_path: Path) -> None:
    import time

    runs = FakeRuns()

    def slow(run: RunRequest) -> RunSummary:
        time.sleep(0.4)
        return runs(run)

    outcome = sweep(sweep_request(tmp_path, *RANGES, max_hours=0.6 / 3600), slow)
    assert len(runs.requests) == 2
    assert outcome.ended_by.startswith("--hours")


@pytest.mark.parametrize("is_published", [False, True])
def test_trials_register_no_model_and_the_best_is_published_with_its_best_seed(
    tmp_path: Path, is_published: bool
) -> None:
    runs = FakeRuns(lambda values, seed: float(str(values[RATE])) - abs(seed - 1))
    options = {"num_seeds": 3, "publish_best": is_published, "objectives": ["dino"]}
    outcome = sweep(sweep_request(tmp_path, "seed=0", f"{RATE}=0.1,0.3", **options), runs)
    registered = [value for (value,) in runs.settings("publishing.is_registered")]
    assert registered == [False] * 6 + [True] * is_published
    assert (outcome.published is not None) == is_published
    if outcome.published is not None:
        assert outcome.published.version == "3"
        assert (runs.requests[-1].settings[RATE], runs.requests[-1].seed) == (0.3, 1)


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    words = (f"{RATE}=0.1,0.3",)
    sweep(sweep_request(tmp_path, *words, study="mine"), FakeRuns())
    for changed, options, message in (
        (words, {"objectives": ["cost_usd"]}, "study mine has another objective; choose another --study NAME"),
        (words, {"num_seeds": 2}, "study mine has other seeds"),
        ((*words, f"{STEPS}=7"), {}, "study mine has other fixed settings"),
        ((f"{RATE}=0.1,0.5",), {}, "study mine searched other values of training.learning_rate"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep(sweep_request(tmp_path, *changed, study="mine", **options), FakeRuns())


def test_the_best_settings_are_a_command_that_repeats_them(tmp_path: Path) -> None:
    import shlex

    from conf.overrides import parse_overrides

    request = sweep_request(tmp_path, *RANGES, num_trials=3)
    outcome = sweep(request, FakeRuns())
    repeated = parse_overrides(shlex.split(outcome.commands[0])[2:])
    assert compile_request(repeated) == compile_request(request.make_trial(outcome.best[0].settings))
