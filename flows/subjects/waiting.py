"""What a scheduled flow run waits for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun


def explain_wait(client: "SyncPrefectClient", run: "FlowRun") -> str:
    """Return what a scheduled run waits for: a worker, or a slot of the pool; empty where it is about to start."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkerFilter,
        WorkerFilterStatus,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType, WorkerStatus
    from prefect.exceptions import ObjectNotFound

    name = run.work_pool_name
    if not name:
        return ""
    try:
        limit = client.read_work_pool(name).concurrency_limit
    except ObjectNotFound:
        return f"the work pool {name} is gone"
    online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE]))
    if not client.read_workers_for_work_pool(name, worker_filter=online, limit=1):
        return f"no worker of the pool {name} is online; `likeness up` starts one"
    active = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]))
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[name]))
    num_active = len(client.read_flow_runs(flow_run_filter=FlowRunFilter(state=active), work_pool_filter=pool))
    return f"all {limit} slots of the pool {name} are in use" if limit is not None and num_active >= limit else ""
