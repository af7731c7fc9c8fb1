"""Prefect states of stages: typed by their manifest, `Cached` where nothing was computed."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from prefect.assets import Asset, AssetProperties
from prefect.client.schemas.objects import State
from prefect.context import AssetContext
from prefect.events import emit_event
from prefect.futures import PrefectFuture
from prefect.states import Completed

from tasks.errors import LikenessError, first_line
from tasks.manifests.base import Manifest
from tasks.stage.cache import PREFIXES
from tasks.stage.context import Runtime

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Manifest)
HOST_LIMIT = "LIKENESS_HOST_LIMIT"
"""Variable of workers: the concurrency limit of their host, which `likeness up` registers."""
SLOT_LEASE_SECONDS = 60.0
"""After which the slot of a dead process comes back."""
SLOT_POLL_SECONDS = 5.0
ASSETS = {"subject": "subject set", "prior": "class images", "training": "tuned model", "publishing": "report"}
UPSTREAM = {"subject": (), "prior": (), "training": ("subject", "prior"), "publishing": ("training", "subject")}


def finished(manifest: M, runtime: Runtime) -> State[M]:
    """Return the state of a finished stage, and tell Prefect of the asset that it has made or reused."""
    record = runtime.records[manifest.stage]
    emit_asset(manifest, runtime)
    counts = ", ".join(f"{count} {name}" for name, count in manifest.counts.items())
    # The name alone: both are of Prefect's state type COMPLETED.
    name = "Cached" if record.is_cached else "Completed"
    return cast(State[M], Completed(name=name, data=manifest, message=f"{manifest.stage_key[:12]}: {counts}"))


def emit_asset(manifest: Manifest, runtime: Runtime) -> None:
    """Emit the events that `@materialize` would, whose assets are fixed before a task is called; ours are content.

    A cached stage references its asset, a computed one materializes it from those of the stages above it.
    """
    if manifest.stage not in ASSETS:
        return
    asset = make_asset(manifest.stage, manifest.stage_key)
    if runtime.records[manifest.stage].is_cached:
        emit_event("prefect.asset.referenced", resource=AssetContext.asset_as_resource(asset))
        return
    upstream = {
        make_asset(stage, runtime.records[stage].key) for stage in UPSTREAM[manifest.stage] if stage in runtime.records
    }
    context = AssetContext(
        downstream_assets={asset},
        direct_asset_dependencies=upstream,
        materialized_by="likeness",
        materialization_metadata={asset.key: {"content_sha256": manifest.compute_content_digest(), **manifest.counts}},
    )
    context.emit_events(Completed())


def make_asset(stage: str, key: str) -> Asset:
    """Return the asset of a stage: its key is the place in the store, which holds no bucket, folder or secret."""
    properties = AssetProperties(name=f"{ASSETS[stage]} {key[:12]}")
    return Asset(key=f"likeness://{PREFIXES[stage]}/{key}", properties=properties)


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


@contextlib.contextmanager
def host_slots(num: int, *, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold slots of this host's concurrency limit, which Prefect's UI shows; nothing where there is no such limit.

    A server that is away grants none and stops nobody: the guard of a device is its lock (`lock_devices`).
    `on_wait` is called with what is waited for; it raises to give up.
    """
    from prefect.concurrency.sync import concurrency

    name = os.environ.get(HOST_LIMIT, "")
    with contextlib.ExitStack() as held:
        while name:
            slots = concurrency(
                name, occupy=num, timeout_seconds=SLOT_POLL_SECONDS, lease_duration=SLOT_LEASE_SECONDS,
                raise_on_lease_renewal_failure=False,
            )  # fmt: skip
            try:
                held.enter_context(slots)
                break
            except TimeoutError:
                on_wait(f"a slot of {name}")
            except Exception as error:  # whatever a server that is restarted makes of it
                log.warning("no slot of %s is held: %s", name, first_line(error))
                break
        try:
            yield
        finally:
            try:
                held.close()
            except Exception as error:  # it comes back when its lease ends
                log.warning("the slot of %s is not given back: %s", name, first_line(error))
