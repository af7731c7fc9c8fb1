"""The requests that the scoring stage would send, for cost estimates."""

from dataclasses import replace

from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge_requests import AXES, JudgeContext, list_judge_requests, list_second_judge_requests
from tasks.services.llm.batch.jobs import can_batch
from tasks.services.llm.budget.cost_estimate import PlannedRequests
from tasks.services.llm.config import LlmConfig


def plan_requests(config: ScoringConfig, llm: LlmConfig, context: JudgeContext) -> list[PlannedRequests]:
    """Return the worst-case requests to the judges for the samples of a context."""
    wants_batch = config.executor == "batch"
    judged = [request.spec for request in list_judge_requests(config, context)]
    plan = [PlannedRequests("judge", judged, is_batch=wants_batch and can_batch(llm, "judge"))]
    if llm.fallback_chain("second_judge"):
        second = [request.spec for request in list_second_judge_requests(config, context)]
        plan.append(PlannedRequests("second_judge", second, is_batch=wants_batch and can_batch(llm, "second_judge")))
    if config.disagreement_threshold:  # at worst, every grade of every sample is disputed
        # Relies on `list_judge_requests`, which puts the samples' own requests first.
        disputed = [replace(spec, is_reasoning=True) for spec in judged[: len(AXES) * len(context.samples)]]
        plan.append(PlannedRequests("judge", disputed, first_fallback=1, is_follow_up=True))
    return plan
