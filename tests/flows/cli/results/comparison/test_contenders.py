"""Trials of sweeps are compared like runs, with the training seeds of a setting together."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from conf.request import RunRequest
from flows.cli.results.compare import Extras, compare_runs
from tasks.errors import ConfigError
from tasks.manifests.run_summary import RunSummary
from tests.support.comparison import make_run
from tests.support.sweep import RATE, FakeRuns, sweep, sweep_request


@dataclass
class EvaluatedRuns(FakeRuns):
    """Runs with folders and manifests: the formula is their DINO above 0.5."""

    output: Path = Path()

    def __call__(self, request: RunRequest) -> RunSummary:
        summary = super().__call__(request)
        seed = request.seed if request.seed is not None else 0
        shift = self.formula(request.settings, seed)
        make_run(self.output, summary.run_id, f"{RATE}={request.settings[RATE]}", f"seed={seed}", shift=shift)
        return summary


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.sweep_settings.draw_plots", lambda study: [])


def make_sweep(output: Path, *words: str, seed_effect: float = 0.0, **options: object) -> str:
    """Run a sweep whose learning rate is what DINO gains, and return its study's name."""
    runs = EvaluatedRuns(lambda values, seed: float(str(values[RATE])) + seed_effect * seed, output=output)
    request = sweep_request(output, *words, **{"objectives": ["dino"], **options})
    return sweep(request, runs).study


def compare(output: Path, *names: str, num_trials: int | None = None) -> dict[str, object]:
    extras = Extras(num_trials=num_trials)
    text = compare_runs(output, names, is_paired=True, as_format="json", extras=extras)
    found: dict[str, object] = json.loads(text)
    return found


def differences(found: dict[str, object]) -> list[float]:
    return [each["mean"] for each in found["metrics"]["dino"]["differences"]]  # type: ignore[index]


def test_the_best_trials_of_a_sweep_are_compared_with_the_best_of_all(tmp_path: Path) -> None:
    study = make_sweep(tmp_path, f"{RATE}=0.01,0.09,0.05,0.03")
    for name in (study, study.removeprefix("sweep-"), str(tmp_path / "sweeps" / f"{study}.journal")):
        found = compare(tmp_path, name)
        assert found["configuration"] == {RATE: ["0.09", "0.05", "0.03"]}
        assert differences(found) == pytest.approx([-0.04, -0.06], abs=0.01)
    assert all(str(name).startswith("trial ") for name in found["runs"])  # type: ignore[attr-defined]
    assert any(f"({RATE}=0.09): 0.0900; run-" in note for note in found["notes"])  # type: ignore[attr-defined]
    assert compare(tmp_path, study, num_trials=2)["configuration"] == {RATE: ["0.09", "0.05"]}
    assert len(compare(tmp_path, study, num_trials=20)["runs"]) == 4  # type: ignore[arg-type]


def test_a_minimized_objective_puts_the_smallest_first(tmp_path: Path) -> None:
    study = make_sweep(tmp_path, f"{RATE}=0.01,0.09,0.05", objectives=["dino:min"])
    assert compare(tmp_path, study)["configuration"] == {RATE: ["0.01", "0.05", "0.09"]}


def test_a_pareto_front_comes_before_what_it_beats(tmp_path: Path) -> None:
    # Later runs take longer: the first trial is the quickest, and those that gain nothing for their time are beaten.
    study = make_sweep(tmp_path, f"{RATE}=0.03,0.02,0.01,0.09", objectives=["dino", "wall_seconds"])
    order = [float(value) for value in compare(tmp_path, study, num_trials=4)["configuration"][RATE]]  # type: ignore[index]
    assert order[0] == 0.09
    assert order[1:] == sorted(order[1:], reverse=True)


def test_a_run_is_the_baseline_of_the_best_trial_of_each_sweep(tmp_path: Path) -> None:
    make_run(tmp_path, "plain-run")
    runs = EvaluatedRuns(output=tmp_path)
    words = (f"{RATE}=0.05,0.01", f"{RATE}=0.02,0.09")
    studies = [sweep(sweep_request(tmp_path, word, objectives=["dino"]), runs).study for word in words]
    found = compare(tmp_path, "plain-run", *studies)
    assert differences(found) == pytest.approx([0.05, 0.09], abs=0.01)
    names = found["runs"]
    assert isinstance(names, list)
    assert names[0] == "plain-run"
    assert [name.split(" trial ")[0] for name in names[1:]] == studies


def test_the_seeds_of_a_setting_are_pooled(tmp_path: Path) -> None:
    study = make_sweep(tmp_path, f"{RATE}=0.01,0.05", "seed=0", num_seeds=3, seed_effect=0.1)
    found = compare(tmp_path, study)
    # A third of the runs each have 0, 0.1 and 0.2 more; the first seed alone would leave the means at 0.55 and 0.51.
    means = [each["mean"] for each in found["metrics"]["dino"]["means"]]  # type: ignore[index]
    assert means == pytest.approx([0.65, 0.61], abs=0.03)
    assert differences(found) == pytest.approx([-0.04], abs=0.01)
    assert [len(runs) for runs in found["run_ids"]] == [3, 3]  # type: ignore[attr-defined]
    assert found["configuration"] == {RATE: ["0.05", "0.01"]}  # the seeds are those of both
    assert "Intervals contain the variance between training seeds" in str(found["conclusion"])
    assert "One training seed" not in str(found["conclusion"])
    assert any("over 3 training seeds" in note for note in found["notes"])  # type: ignore[attr-defined]


def test_a_difference_within_the_variance_of_training_seeds_is_inconclusive(tmp_path: Path) -> None:
    words = (f"{RATE}=0.01,0.05", "seed=0")
    decided = compare(tmp_path / "a", make_sweep(tmp_path / "a", *words, num_seeds=3, seed_effect=0.001))
    lost = compare(tmp_path / "b", make_sweep(tmp_path / "b", *words, num_seeds=3, seed_effect=0.1))
    for found, is_decided in ((decided, True), (lost, False)):
        [difference] = found["metrics"]["dino"]["differences"]  # type: ignore[index]
        assert (difference["high"] < 0) is is_decided
    assert "DINO (subject fidelity) is lower" in str(decided["conclusion"])
    assert "DINO (subject fidelity) is inconclusive" in str(lost["conclusion"])


def test_a_run_is_compared_with_the_mean_over_the_seeds_of_a_setting(tmp_path: Path) -> None:
    make_run(tmp_path, "plain-run")
    study = make_sweep(tmp_path, f"{RATE}=0.01,0.05", "seed=0", num_seeds=3, seed_effect=0.1)
    found = compare(tmp_path, "plain-run", study)
    # 0.05 and 0, 0.1, 0.2 by seed; the first seed alone would give 0.05.
    assert differences(found) == pytest.approx([0.15], abs=0.01)
    means = [each["mean"] for each in found["metrics"]["dino"]["means"]]  # type: ignore[index]
    assert means[1] - means[0] == pytest.approx(differences(found)[0], abs=1e-6)
    assert any("different numbers of training seeds" in note for note in found["notes"])  # type: ignore[attr-defined]
    assert "One training seed of plain-run stands for a model, not a setting" in str(found["conclusion"])
    assert differs_by(found) > 0.4  # three seeds 0.1 apart: Student's t 4.30 times 0.058, on both sides


def differs_by(found: dict[str, object]) -> float:
    """Return the width of the interval of the first difference in DINO."""
    [difference] = found["metrics"]["dino"]["differences"]  # type: ignore[index]
    return float(difference["high"] - difference["low"])


def test_what_a_sweep_cannot_offer_is_one_line(tmp_path: Path) -> None:
    make_run(tmp_path, "plain-run")
    single = make_sweep(tmp_path, f"{RATE}=0.01", num_seeds=2)
    with pytest.raises(ConfigError, match=f"{single} has a single setting to compare"):
        compare(tmp_path, single)
    with pytest.raises(ConfigError, match="--trials takes the best of a sweep, and none is named"):
        compare(tmp_path, "plain-run", "run-1", num_trials=2)
    with pytest.raises(ConfigError, match="no run 'sweep-none'"):
        compare(tmp_path, "sweep-none")
    with pytest.raises(ConfigError, match="the same run is named twice"):
        compare(tmp_path, single, "run-1")
    (tmp_path / "run-2").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="trial 0 of .* has lost run-2"):
        compare(tmp_path, single, "plain-run")
    (tmp_path / "sweeps" / "damaged.journal").write_text("{")
    with pytest.raises(ConfigError, match=r"damaged.journal can't be read"):
        compare(tmp_path, "damaged")
