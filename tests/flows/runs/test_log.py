"""Progress of a flow run on a real Prefect server: log lines and an artifact."""

import time
import uuid
from collections.abc import Iterator

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from flows.runs.log import LoggedProgress, make_run_progress
from tests.support.cli_sandbox import serve_prefect

PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    with (
        serve_prefect(tmp_path_factory.mktemp("prefect")) as url,
        SyncPrefectClient(url) as client,
        temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_TO_API_ENABLED: True}),
    ):
        yield client


@flow(persist_result=False)
def train() -> uuid.UUID:
    """Report 300 steps within a second, as of a minute and a half, and the end twice."""
    progress = make_run_progress()
    assert isinstance(progress, LoggedProgress)
    for step in range(1, 301):
        if step in (100, 200):
            progress.schedule.last_printed["training"] -= 31  # so long ago
        progress.update("training", step, 300, detail=f"loss 0.{step:04}  36 images/s")
    progress.update("training", 300, 300)
    progress.note("the end")
    progress.close()
    return uuid.UUID(str(flow_run.id))


def read_lines(client: SyncPrefectClient, run_id: uuid.UUID) -> list[str]:
    logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])))
    return [log.message for log in sorted(logs, key=lambda log: log.timestamp)]


def test_a_stage_logs_its_beginning_its_end_and_a_line_every_half_minute(client: SyncPrefectClient) -> None:
    run_id = train()
    deadline = time.monotonic() + PATIENCE_SECONDS  # Prefect sends lines every two seconds
    while "the end" not in (lines := read_lines(client, run_id)):
        assert time.monotonic() < deadline, lines
        time.sleep(0.2)
    assert [line for line in lines if line.startswith("training: ")] == [
        "training: 1/300  loss 0.0001  36 images/s",
        "training: 100/300  loss 0.0100  36 images/s",
        "training: 200/300  loss 0.0200  36 images/s",
        "training: 300/300  loss 0.0300  36 images/s",
    ]
    found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])))
    assert [(artifact.key, artifact.data) for artifact in found] == [("progress-training", 100.0)]


def test_outside_a_flow_run_progress_is_shown_where_the_process_runs_alone() -> None:
    progress = make_run_progress()
    assert not isinstance(progress, LoggedProgress)
    progress.close()
