"""`likeness sweep` and `likeness run -m`: options, help, and the table of trials."""

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from conf.request import RunRequest
from conf.sweep import SweepRequest, read_sweep
from flows.cli.main import main
from flows.cli.run.sweep import print_sweep
from flows.runs.context import trust_of_run
from flows.runs.records import write_request
from tasks.errors import TrainingFailed
from tasks.manifests.run_summary import RunSummary
from tasks.stage.progress import ProgressView, make_progress
from tests.support.sweep import RATE, FakeRuns, interrupt_after, sweep, sweep_request


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[SweepRequest]:
    """The sweeps that are typed, in place of running them."""
    found: list[SweepRequest] = []

    def record(settings: Sequence[str], options: Mapping[str, object]) -> int:
        found.append(read_sweep(settings, options))
        return 0

    monkeypatch.setattr("flows.cli.run.sweep.sweep_in_terminal", record)
    return found


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--trials", "7"], "num_trials", 7),
        (["--hours", "1.5"], "max_hours", 1.5),
        (["--usd", "2"], "max_usd", 2.0),
        (["--sampler", "random", "--trials", "2"], "sampler", "random"),
        (["--objective", "cost_usd"], "objectives", ["cost_usd"]),
        (["--objective", "dino", "--objective", "wall_seconds:min"], "objectives", ["dino", "wall_seconds:min"]),
        (["--seeds", "3"], "num_seeds", 3),
        (["--pruner", "median"], "pruner", "median"),
        (["--parallel", "4"], "num_parallel", 4),
        (["--publish-best"], "publish_best", True),
        (["--study", "mine"], "study", "mine"),
    ],
)
def test_an_option_sets_its_field(typed: list[SweepRequest], words: list[str], field: str, value: object) -> None:
    assert main(["sweep", f"{RATE}=1e-5,1e-4", *words]) == 0
    assert getattr(typed[0], field) == value
    assert getattr(SweepRequest(space={RATE: [1]}), field) != value  # not the default


def test_multirun_is_the_same_sweep(typed: list[SweepRequest]) -> None:
    for option in ("-m", "--multirun"):
        assert main(["run", option, "experiment=smoke", f"{RATE}=1e-5,1e-4"]) == 0
    assert main(["sweep", "experiment=smoke", f"{RATE}=1e-5,1e-4"]) == 0
    assert typed[0] == typed[1] == typed[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "UsageError: Invalid value for '--seeds'"),
        (["--seeds", "-3"], "UsageError: Invalid value for '--seeds'"),
        (["--seeds", "x"], "UsageError: Invalid value for '--seeds'"),
        (["--seeds", "51"], "ConfigError: num_seeds: Input should be less than or equal to 50"),
        (["--seeds", "3", "--dry-run"], "Invalid value for '--seeds': not with --dry-run"),
        (["--seeds", "3", "-m", "training.max_train_steps=1,2"], "use `likeness sweep --seeds`"),
        (["--seeds", "3", "seed=1,2"], "`likeness sweep`, or -m, takes several"),
    ],
)
def test_wrong_seeds_of_a_run_are_a_one_line_error(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["run", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("is_trusted", [True, False])
def test_a_run_with_seeds_is_a_study_of_its_request_with_its_restrictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_trusted: bool
) -> None:
    runs, trusted = FakeRuns(lambda values, seed: 0.1 * seed), list[bool]()

    def run_one(request: RunRequest) -> RunSummary:
        trusted.append(trust_of_run.get())
        return runs(request)

    @contextlib.contextmanager
    def ready(request: RunRequest, *, is_trusted: bool) -> Iterator[tuple[None, ProgressView, None]]:
        trusted.append(is_trusted)
        yield None, make_progress(), None

    monkeypatch.setattr("flows.cli.run.sweep.ready_for_flows", ready)
    monkeypatch.setattr("flows.sweep_settings.sweep_settings", lambda request: sweep(request, run_one))
    write_request(tmp_path, RunRequest(settings={"output_dir": str(tmp_path / "runs"), "tracking.kind": "none"},
                                       publishing="local", seed=4), is_trusted=is_trusted)  # fmt: skip
    words = ["--request", str(tmp_path / "request.json"), "seed=5", "--seeds", "3"]
    assert main(["run", *words]) == 0
    assert [request.seed for request in runs.requests] == [5, 6, 7]
    assert set(trusted) == {is_trusted}
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"seeds-\w{10}: 3 training seeds", "\n".join(lines))
    dino = next(line for line in lines if line.startswith("DINO "))
    assert dino.split() == ["DINO", "0.600", "0.352,", "0.848", "0.500", "0.600", "0.700"]
    assert next(line for line in lines if line.startswith("CLIP-T ")).split()[2] == "none"
    assert "runs      run-1 run-2 run-3" in lines


@pytest.mark.parametrize("word", ["--dry-run", "--request=x.json"])
def test_multirun_excludes_what_repeats_one_run(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert main(["run", "-m", "seed=1,2", word]) == 2
    assert "Invalid value for '-m'" in capsys.readouterr().err


def test_a_run_with_several_values_names_the_command_that_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "seed=1,2"]) == 2
    assert "`likeness sweep`, or -m, takes several" in capsys.readouterr().err


def test_every_example_of_the_help_is_a_valid_sweep(
    typed: list[SweepRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    examples = re.findall(r"^    likeness (sweep .*?)(?:  +# .*)?$", text, re.MULTILINE)
    assert len(examples) >= 6
    for example in examples:
        assert main(shlex.split(example)) == 0
    assert {"1e-6..1e-4:log", "--seeds", "--parallel", "--objective", "--publish-best"} <= set(
        re.split(r"[\s=]", " ".join(examples))
    )
    assert "training/method" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1..2:x"], "ConfigError: seed: 'x' is no scale or step of a range"),
        (["seed=1,2", "--objective", "dinno"], "did you mean dino"),
        (["seed=1,2", "--sampler", "cma"], "UsageError: Invalid value for '--sampler'"),
        (["seed=1,2", "--seeds", "0"], "UsageError: Invalid value for '--seeds'"),
        (["seed=1"], "ConfigError: no setting has several values"),
        ([], "ConfigError: no setting has several values"),
        (["--seeds", "3", "--parallel", "2"], "ConfigError: num_parallel needs several trials"),
    ],
)
def test_a_wrong_sweep_is_a_one_line_error(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["sweep", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_table_has_intervals_cached_stages_reasons_and_the_next_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.sweep_settings.draw_plots", lambda study: [])
    monkeypatch.chdir(tmp_path)
    runs = FakeRuns(lambda values, seed: float(str(values[RATE])) + seed / 10)

    def fail(request: object) -> object:
        if getattr(request, "settings", {}).get(RATE) == 0.9:
            raise TrainingFailed("not finite [bold]")
        return runs(request)  # type: ignore[arg-type]

    words = (f"{RATE}=0.1,0.3,0.9", "seed=1")
    request = sweep_request(tmp_path / "runs", *words, num_seeds=2, objectives=["dino"])
    with pytest.raises(KeyboardInterrupt):
        sweep(request, interrupt_after(1, runs))
    print_sweep(sweep(request, fail))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    best = next(line for line in lines if line.startswith("*"))
    # 0.4 and 0.5: half the width is 12.706 (Student's t) x 0.05.
    assert re.search(r"0\.4500 \[-0\.1853, 1\.0853\] +0\.3 +1 of 12 +0\.50000 +run-1 run-2", best)
    assert any(re.search(r"^ +0 +interrupted +0\.1", line) for line in lines)
    assert "  trial 2 failed: not finite [bold]" in lines
    assert "3 new trials; cached stages: prior 3; cached latents: 27 images" in lines
    assert "ended by: every combination is tried; 1.00000 USD in all" in lines
    assert any(line.startswith("best      likeness run ") and f"{RATE}=0.3" in line for line in lines)
    assert f"report    runs/sweeps/{request.study_name}/report.html" in lines
    assert f"study     optuna-dashboard runs/sweeps/{request.study_name}.journal" in lines
