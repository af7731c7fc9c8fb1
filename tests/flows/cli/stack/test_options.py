"""Options of a stack that a later `up` keeps, beside real processes."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flows.cli.stack.processes import StackProcess, start_detached, stop
from flows.cli.stack.screen import note_local_artifacts, start_stack
from flows.cli.stack.stack import (
    DEFAULT_MAX_RUNS,
    HEARTBEATS,
    MLFLOW,
    PREFECT,
    StackOptions,
    StackState,
    adopt_options,
    find_artifacts,
    prefect_environment,
    read_state,
    store_environment,
    write_state,
)
from tasks.errors import ConfigError
from tasks.services.config import TrackingConfig
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tests.support.config import make_config

DATABASE = "postgresql+asyncpg://prefect:p%40ss@127.0.0.1:5432/prefect?password=p%40ss"


@pytest.fixture
def typed(tmp_path: Path) -> StackOptions:
    """What `up` without options asks for."""
    return StackOptions(tmp_path, 0, 0, 0)


def start(options: StackOptions, name: str) -> StackProcess:
    """Record a process that runs, as a server of a stack whose other processes have died."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = start_detached(name, command, log=options.output / "log", environment={})
    write_state(options, process)
    return process


@pytest.fixture
def first(typed: StackOptions) -> Iterator[StackOptions]:
    """The options of a stack whose MLflow server lives."""
    options = adopt_options(replace(typed, s3_url="s3://a-bucket/team", max_runs=5), read_state(typed.output))
    process = start(options, MLFLOW)
    yield options
    stop(process, seconds=20)


def test_a_second_up_without_options_keeps_bucket_and_runs_at_a_time(typed: StackOptions, first: StackOptions) -> None:
    second = adopt_options(typed, read_state(typed.output))
    assert (second.s3_url, second.max_runs) == ("s3://a-bucket/team", 5)
    assert store_environment(second, 5000)["LIKENESS_STORE_URL"] == "s3://a-bucket/team"
    assert find_artifacts(second) == find_artifacts(first) == "s3://a-bucket/team/mlflow"
    same = replace(typed, s3_url="s3://a-bucket/team/", max_runs=5)
    assert adopt_options(same, read_state(typed.output)).kept == first.kept


def test_all_processes_of_a_stack_agree_how_often_runs_send_heartbeats(
    typed: StackOptions, first: StackOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else automation and watchdog would mark living runs as crashed."""
    assert prefect_environment(first, 4200)[HEARTBEATS] == "180"
    monkeypatch.setenv(HEARTBEATS, "60")
    with pytest.raises(ConfigError, match=rf"run with {HEARTBEATS} 180, not {HEARTBEATS} 60; `likeness down` first"):
        adopt_options(typed, read_state(typed.output))
    fresh = adopt_options(replace(typed, output=typed.output / "other"), StackState())
    assert prefect_environment(fresh, 4200)[HEARTBEATS] == "60"
    for wrong in ("29", "-60", "a minute", "1e3"):
        monkeypatch.setenv(HEARTBEATS, wrong)
        with pytest.raises(ConfigError, match=rf"{HEARTBEATS}='{wrong}': seconds, at least 30"):
            adopt_options(typed, read_state(typed.output))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"s3_url": "s3://a-bucket/other"},
            "run with --s3 s3://a-bucket/team, not --s3 s3://a-bucket/other; `likeness",
        ),
        ({"database_url": DATABASE}, "run with no --postgres, not --postgres postgresql"),
        ({"max_runs": 2}, "run with --max-runs 5, not --max-runs 2; `likeness down` first"),
    ],
)
def test_other_options_are_refused_while_a_server_lives(
    typed: StackOptions, first: StackOptions, changes: dict[str, object], message: str
) -> None:
    before = read_state(typed.output)
    with pytest.raises(ConfigError, match=message) as refused:
        adopt_options(replace(typed, **changes), before)
    assert "p%40ss" not in str(refused.value)
    if "database_url" not in changes:  # a database is reached first
        with pytest.raises(ConfigError, match=message):
            start_stack(replace(typed, **changes))
    assert read_state(typed.output) == before


def test_other_options_are_taken_where_nothing_runs_any_more(typed: StackOptions) -> None:
    options = adopt_options(replace(typed, s3_url="s3://a-bucket/team"), read_state(typed.output))
    stop(start(options, PREFECT), seconds=20)
    assert adopt_options(typed, read_state(typed.output)).s3_url == "s3://a-bucket/team"
    moved = adopt_options(replace(typed, s3_url="s3://b-bucket"), read_state(typed.output))
    assert (moved.s3_url, moved.max_runs) == ("s3://b-bucket/likeness", DEFAULT_MAX_RUNS)


def test_a_database_is_recorded_without_its_password_and_asked_for_again(typed: StackOptions) -> None:
    options = adopt_options(replace(typed, database_url=DATABASE), read_state(typed.output))
    process = start(options, PREFECT)
    assert "p%40ss" not in (typed.folder / "state.json").read_text()
    again = adopt_options(typed, read_state(typed.output))
    assert again.kept.database == "postgresql+asyncpg://prefect@127.0.0.1:5432/prefect"
    stop(process, seconds=20)
    with pytest.raises(ConfigError, match="password is not recorded; give --postgres again, or `likeness down` first"):
        adopt_options(typed, read_state(typed.output))
    assert adopt_options(replace(typed, database_url=DATABASE), read_state(typed.output)).kept == options.kept


def test_artifacts_lie_below_the_prefix_that_the_store_takes(typed: StackOptions) -> None:
    assert find_artifacts(replace(typed, s3_url="s3://a-bucket")) == "s3://a-bucket/likeness/mlflow"
    assert find_artifacts(typed) == str(typed.output / "artifacts")


def test_an_experiment_that_keeps_artifacts_on_disk_is_named(
    typed: StackOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    database = typed.output / "mlflow.db"
    note_local_artifacts(database, "likeness")
    assert not database.exists()
    tracker = MlflowTracker(make_config(TrackingConfig), folder=typed.output)  # as `likeness run` before `up --s3`
    tracker.find_experiment()
    # As a server creates one.
    tracker.client.create_experiment("served", artifact_location="mlflow-artifacts:/7")
    for other in ("served", "none"):
        note_local_artifacts(database, other)
    assert capsys.readouterr().err == ""
    note_local_artifacts(database, tracker.config.experiment)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: artifacts of experiment {tracker.config.experiment!r} stay in file://")
    assert "another tracking.experiment" in line
