"""Prefect states of stages: typed by their manifest, `Cached` where nothing was computed."""

from typing import Any, TypeVar, cast

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed

from tasks.errors import LikenessError
from tasks.manifests.base import Manifest
from tasks.stage.context import Runtime

M = TypeVar("M", bound=Manifest)


def finished(manifest: M, runtime: Runtime) -> State[M]:
    """Return the state of a finished stage."""
    record = runtime.records[manifest.stage]
    counts = ", ".join(f"{count} {name}" for name, count in manifest.counts.items())
    # The name alone: both are of Prefect's state type COMPLETED.
    name = "Cached" if record.is_cached else "Completed"
    return cast(State[M], Completed(name=name, data=manifest, message=f"{manifest.stage_key[:12]}: {counts}"))


def should_retry(task: Any, run: Any, state: State[Any]) -> bool:
    """Return whether Prefect retries a failed step: only for errors that waiting can resolve."""
    error = state.data
    try:
        state.result(raise_on_failure=True)
    except LikenessError as raised:
        return raised.is_retryable
    except BaseException:  # cancellation, and errors outside our tree: a retry would not help
        return False
    return bool(getattr(error, "is_retryable", False))


def result_of(state: State[M]) -> M:
    """Return the manifest of a finished step; raise the error of a failed one.

    Prefect types a task that returns a state by that state, but unwraps it when the task is called.
    """
    return state.result(raise_on_failure=True) if isinstance(state, State) else state


def wait_for(future: "PrefectFuture[State[M]]") -> M:
    """Wait for a submitted step and return its manifest; raise the error of a failed one."""
    return result_of(future.result())
