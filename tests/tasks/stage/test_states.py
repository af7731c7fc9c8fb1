"""Steps as Prefect runs them: again where waiting can resolve the error, and without a look into their services."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Cancelled, Failed

from tasks.errors import ConfigError, LeaseLost, ReplyInvalid, ServiceUnavailable, StillPending, SubjectRejected
from tasks.publishing.steps import publish
from tasks.services.store.local import LocalStore
from tasks.stage.context import Runtime
from tasks.stage.states import quoted, should_retry
from tests.support.cli_sandbox import serve_prefect

RETRYABLE = (ServiceUnavailable("gone"), ReplyInvalid("not JSON"))
FINAL = (
    ConfigError("wrong"), SubjectRejected("too few"), StillPending("a batch job"), LeaseLost("taken over"),
    ValueError("a defect"),
)  # fmt: skip
BY_KIND = {"ids": lambda error: type(error).__name__}


@pytest.mark.parametrize("error", RETRYABLE, **BY_KIND)
def test_an_error_that_waiting_can_resolve_is_retried(error: BaseException) -> None:
    assert should_retry(publish, None, Failed(data=error))


@pytest.mark.parametrize("error", FINAL, **BY_KIND)
def test_any_other_error_is_not_retried(error: BaseException) -> None:
    assert not should_retry(publish, None, Failed(data=error))


def test_a_cancelled_step_is_not_retried() -> None:
    assert not should_retry(publish, None, Cancelled(message="by a person"))


def test_publishing_is_retried_once_and_not_by_all_runs_at_the_same_moment() -> None:
    assert publish.retry_condition_fn is should_retry
    assert publish.retries == 1
    assert publish.retry_delay_seconds == 3
    assert publish.retry_jitter_factor == 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    quiet = {PREFECT_LOGGING_TO_API_ENABLED: False}  # no lines that would be sent when the server is gone
    with serve_prefect(tmp_path_factory.mktemp("prefect")) as url, temporary_settings({PREFECT_API_URL: url, **quiet}):
        yield


@dataclass
class Watched:
    """A service whose parts other threads change: whoever walks through them at that moment fails."""

    logged: int = 0

    def __getattribute__(self, name: str) -> object:
        if name == "logged":
            raise RuntimeError("Set changed size during iteration")
        return super().__getattribute__(name)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("is_submitted", [False, True], ids=["called", "submitted"])
def test_prefect_does_not_walk_through_the_services_of_a_run(tmp_path: Path, is_submitted: bool) -> None:
    nothing = Mock()
    runtime = Runtime(
        "r", LocalStore(tmp_path), llm=nothing, tracker=nothing, progress=nothing, live=Watched(), work_folder=tmp_path
    )  # type: ignore[arg-type]

    @task(persist_result=False)
    def step(given: Runtime) -> str:
        assert given is runtime
        return given.run_id

    @flow(persist_result=False)
    def run(given: Callable[[Runtime], Runtime]) -> str:
        return step.submit(given(runtime)).result() if is_submitted else step(given(runtime))

    assert run(quoted) == "r"
    with pytest.raises(RuntimeError, match="during iteration"):
        run(lambda plain: plain)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("error", "attempts"), [(RETRYABLE[0], 2), (FINAL[0], 1)], ids=["retryable", "final"])
def test_prefect_runs_a_step_again_by_this_condition(error: Exception, attempts: int) -> None:
    made = []

    @task(persist_result=False, retries=1, retry_delay_seconds=0, retry_condition_fn=should_retry)
    def fail() -> None:
        made.append(error)
        raise error

    @flow(persist_result=False)
    def run() -> None:
        fail()

    with pytest.raises(type(error)):
        run()
    assert len(made) == attempts
