"""LLM calls as traces of MLflow: who answered, how fast, at which cost. No prompt, reply or image is passed on."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.services.tracking.base import LlmCall

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
PAGE_SIZE = 500


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
    num_stored = count_traces(client, run_id=run_id, experiment_id=experiment_id)
    if num_stored < len(calls):
        log.warning("the tracking server has %d of %d traces of LLM calls", num_stored, len(calls))


def count_traces(client: "MlflowClient", *, run_id: str, experiment_id: str) -> int:
    """Return how many traces a run has."""
    count, token = 0, None
    while True:
        page = client.search_traces(
            locations=[experiment_id], run_id=run_id, max_results=PAGE_SIZE, page_token=token, include_spans=False
        )
        count, token = count + len(page), page.token
        if not token:
            return count
