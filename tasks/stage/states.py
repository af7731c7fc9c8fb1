"""How steps tell Prefect what happened: cached stages, and errors worth another try."""

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.errors import LikenessError
from tasks.manifests.base import Manifest
from tasks.stage.context import Runtime


def finished(manifest: Manifest, runtime: Runtime) -> State[Any]:
    """Return the state of a finished stage: `Cached` where nothing was computed."""
    record = runtime.records[manifest.stage]
    counts = ", ".join(f"{count} {name}" for name, count in manifest.counts.items())
    name = "Cached" if record.is_cached else "Completed"
    return Completed(name=name, data=manifest, message=f"{manifest.stage_key[:12]}: {counts}")


def should_retry(task: Any, run: Any, state: State[Any]) -> bool:
    """Whether a failed step is tried again: only where waiting can help."""
    error = state.data
    try:
        state.result(raise_on_failure=True)
    except LikenessError as raised:
        return raised.is_retryable
    except BaseException:
        return False
    return bool(getattr(error, "is_retryable", False))


def result_of(state: Any) -> Any:
    """Return the manifest behind a finished step's state; raise what made it fail."""
    return state.result(raise_on_failure=True) if isinstance(state, State) else state
