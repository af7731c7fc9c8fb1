"""LLM calls as traces of MLflow: who answered, how fast, at which cost. No prompt, reply or image is passed on."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.services.tracking.base import LlmCall

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
PAGE_SIZE = 500
DELETED_AT_ONCE = 100


def log_traces(client: "MlflowClient", calls: Sequence[LlmCall], *, uri: str, run_id: str, experiment_id: str) -> None:
    """Log one trace per call, with its own start and end, and wait until they are sent."""
    import mlflow
    from mlflow.tracing.constant import SpanAttributeKey, TokenUsageKey

    # The exporter of traces is the process's, and takes no other address. It logs failures and drops the trace.
    mlflow.set_tracking_uri(uri)
    for call in calls:
        usage = {
            TokenUsageKey.INPUT_TOKENS: call.input_tokens,
            TokenUsageKey.OUTPUT_TOKENS: call.output_tokens,
            TokenUsageKey.TOTAL_TOKENS: call.input_tokens + call.output_tokens,
        }
        attributes: dict[str, Any] = {**call.attributes, SpanAttributeKey.CHAT_USAGE: usage}
        started_ns = int((call.ended_at - call.seconds) * 1e9)
        span = client.start_trace(
            call.role, span_type="LLM", experiment_id=experiment_id, run_id=run_id, start_time_ns=started_ns,
            attributes=attributes,
        )  # fmt: skip
        status = "OK" if call.is_ok else "ERROR"
        client.end_trace(span.trace_id, status=status, end_time_ns=int(call.ended_at * 1e9))
    mlflow.flush_trace_async_logging()
    num_stored = len(list_traces(client, run_id=run_id, experiment_id=experiment_id))
    if num_stored < len(calls):
        log.warning("the tracking server has %d of %d traces of LLM calls", num_stored, len(calls))


def list_traces(client: "MlflowClient", *, run_id: str, experiment_id: str) -> list[str]:
    """Return the ids of a run's traces."""
    ids: list[str] = []
    token = None
    while True:
        page = client.search_traces(
            locations=[experiment_id], run_id=run_id, max_results=PAGE_SIZE, page_token=token, include_spans=False
        )
        ids += [trace.info.trace_id for trace in page]
        token = page.token
        if not token:
            return ids


def delete_traces(client: "MlflowClient", *, run_id: str, experiment_id: str) -> None:
    """Delete a run's traces, which would outlive it in the experiment."""
    ids = list_traces(client, run_id=run_id, experiment_id=experiment_id)
    for start in range(0, len(ids), DELETED_AT_ONCE):
        client.delete_traces(experiment_id, trace_ids=ids[start : start + DELETED_AT_ONCE])
