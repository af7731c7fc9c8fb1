"""Prefect states of stages: typed by their manifest, `Cached` where nothing was computed."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect.assets import Asset, AssetProperties
from prefect.client.schemas.objects import State
from prefect.context import AssetContext
from prefect.events import emit_event
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Completed
from prefect.utilities.annotations import quote

from tasks.errors import LikenessError, first_line
from tasks.manifests.base import Manifest
from tasks.services.store.lease import read_boot
from tasks.stage.cache import PREFIXES
from tasks.stage.context import Runtime

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Manifest)
HTTP_LOCKED = 423
HOST_LIMIT = "LIKENESS_HOST_LIMIT"
"""Variable of workers: the concurrency limit of their host. Empty: none; unset: one that is named after the host."""
WORKER_RUN = "PREFECT__FLOW_RUN_ID"
"""Variable of the processes, containers and pods in which workers execute runs."""
CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
EMBEDDED = "LIKENESS_EMBEDDED_SERVER"
"""Variable of processes whose server is a run's own."""
SLOT_LEASE_SECONDS = 120.0
"""After which the slot of a dead process comes back."""
SLOT_POLL_SECONDS, SLOT_TIMEOUT_SECONDS, RELEASE_SECONDS = 5.0, 30.0, 10.0
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


def quoted(runtime: Runtime) -> Runtime:
    """Return the runtime as an argument of steps that Prefect hands over as it is.

    It looks for results of other steps in every part of an argument, and fails where a thread changes one meanwhile.
    """
    return cast(Runtime, quote(runtime))


@contextlib.contextmanager
def host_slots(num: int, *, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold slots of this host's concurrency limit, which Prefect's UI shows; nothing where there is no such limit.

    To be taken once the devices are locked: the lock is the guard, and keeps the order of those that wait. A server
    that is away or slow grants none, and stops nobody. `on_wait` is called with what is waited for; it may raise.
    """
    name = "" if os.environ.get(EMBEDDED) or num < 1 else name_limit()
    num = prepare_limit(name, num) if name else num
    held = contextlib.ExitStack()
    while name and not take_slots(held, name, num):
        on_wait(f"a slot of {name}")
        time.sleep(SLOT_POLL_SECONDS)
    try:
        yield
    finally:
        close_quietly(held, name)


def give_up_soon() -> contextlib.AbstractContextManager[object]:
    """Let Prefect's clients give up soon."""
    return temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1, PREFECT_API_REQUEST_TIMEOUT: RELEASE_SECONDS})


def name_limit() -> str:
    """Return the name of the host's concurrency limit; empty outside of workers."""
    default = ""
    if os.environ.get(WORKER_RUN):
        # A container's own name is new each time; what all containers of a host share is the start of its kernel.
        is_contained = any(mark.exists() for mark in CONTAINER_MARKS)
        default = f"likeness-{(is_contained and read_boot()[:8]) or socket.gethostname()}"
    return os.environ.get(HOST_LIMIT, default)


def count_host_gpus() -> int:
    """Return the number of GPUs of this host, in a container of those that it was given."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def prepare_limit(name: str, num: int) -> int:
    """Create a host's limit where the server has none; return how many slots to take: no more than it can grant."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    try:
        with give_up_soon(), get_client(sync_client=True) as client:
            try:
                limit = client.read_global_concurrency_limit_by_name(name).limit
            except ObjectNotFound:
                limit = max(num, count_host_gpus())
                with contextlib.suppress(ObjectAlreadyExists):  # by another run of this host, in the meantime
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
                log.info("concurrency limit %s registered: %d trainings at a time on this host", name, limit)
    except Exception as error:  # away, slow or restarted: `take_slots` proceeds without a slot
        log.warning("concurrency limit %s was not looked up: %s", name, first_line(error))
        return num
    return max(1, min(num, limit))  # with none at all, an operator has paused the host


def take_slots(held: contextlib.ExitStack, name: str, num: int) -> bool:
    """Take slots if they are free, or none from a server that can't say; return False where they are in use."""
    from prefect.concurrency.sync import concurrency

    # No retries within: they wait in Prefect's client, where `on_wait` can't give up.
    slots = concurrency(
        name, occupy=num, max_retries=0, timeout_seconds=SLOT_TIMEOUT_SECONDS, lease_duration=SLOT_LEASE_SECONDS,
        raise_on_lease_renewal_failure=False,
    )  # fmt: skip
    try:
        held.enter_context(slots)
    except Exception as error:  # whatever a server that is restarted makes of it
        cause = error.__cause__ or error
        if getattr(getattr(cause, "response", None), "status_code", 0) == HTTP_LOCKED:
            return False
        log.warning("no slot of %s is held: %s", name, first_line(cause))
    return True


def close_quietly(held: contextlib.ExitStack, name: str) -> None:
    """Give slots back; one that can't be comes back when its lease ends."""
    # By its defaults the client would keep a finished training for minutes where the server is suspended.
    try:
        with give_up_soon():
            held.close()
    except Exception as error:
        log.warning("the slot of %s is not given back: %s", name, first_line(error))
