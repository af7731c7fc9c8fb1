"""Expected and worst-case cost of requests, before any is sent."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel

from tasks.services.llm.batch.jobs import MAX_BYTES
from tasks.services.llm.budget.ledger import compute_cost
from tasks.services.llm.chat.body import count_body_tokens
from tasks.services.llm.chat.completion import Usage
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import RESPONSE_FORMATS, LlmConfig, ProfileConfig

SHORT_REPLY_TOKENS = 120
REPAIR_TOKENS = 700  # upper bound of a repair note, and of a capability probe's prompt


@dataclass(frozen=True)
class CallEstimate:
    """Calls, tokens and cost of one role."""

    role: str
    profile: str
    calls: int
    """Expected: one per request."""
    worst_calls: int
    """With every retry, repair and profile of the fallback chain."""
    input_tokens: int
    """Expected."""
    expected_usd: float | None
    """With replies of 120 tokens from the first profile; None where no price is known."""
    worst_usd: float | None
    """With all `worst_calls` billed, and replies of maximal length."""
    is_batch: bool
    largest_file_bytes: int


@dataclass(frozen=True)
class Totals:
    """Tokens and bytes of all requests to one profile."""

    max_usage: Usage
    num_bytes: int


@dataclass(frozen=True)
class PlannedRequests:
    """Requests that a stage would send to a role."""

    role: str
    specs: Sequence[RequestSpec[BaseModel]]
    is_batch: bool = False
    first_fallback: int = 0
    """Index in the fallback chain to begin at."""
    is_follow_up: bool = False
    """Whether they are sent only where replies call for them: they count in the worst case alone."""


def estimate_calls(config: LlmConfig, planned: PlannedRequests) -> CallEstimate:
    """Return calls, tokens and cost of a role's requests over its fallback chain."""
    role, requests, is_batch = planned.role, planned.specs, planned.is_batch
    names = config.fallback_chain(role)
    names = names[min(planned.first_fallback, len(names) - 1) :]
    first = config.profiles[names[0]]
    totals = {name: count_all(config.profiles[name], requests) for name in names}
    max_usage = totals[names[0]].max_usage
    short = replace(max_usage, output_tokens=min(max_usage.output_tokens, len(requests) * SHORT_REPLY_TOKENS))
    worst_calls, worst_usd = 0, list[float | None]()
    for name in names:
        calls, usd = count_worst(config, name, totals[name].max_usage, num=len(requests))
        worst_calls += calls
        worst_usd.append(usd)
    if is_batch:  # worst case: a job cancelled past its deadline is billed, and its rows are sent again as calls
        worst_calls += len(requests)
        worst_usd.append(compute_cost(first.prices, max_usage, is_batch=True)[0])
    return CallEstimate(
        role=role,
        profile=names[0],
        calls=0 if planned.is_follow_up else len(requests),
        worst_calls=worst_calls,
        input_tokens=max_usage.input_tokens,
        expected_usd=0.0 if planned.is_follow_up else compute_cost(first.prices, short, is_batch=is_batch)[0],
        worst_usd=None if None in worst_usd else sum(usd for usd in worst_usd if usd is not None),
        is_batch=is_batch,
        # Larger input is split into several files.
        largest_file_bytes=min(totals[names[0]].num_bytes, MAX_BYTES),
    )


def count_all(profile: ProfileConfig, requests: Sequence[RequestSpec[BaseModel]]) -> Totals:
    """Return the input tokens, the cap on output tokens and the bytes of all requests to one profile."""
    response_format = profile.capabilities.response_format
    tokens_in = tokens_out = size = 0
    # Each distinct object is encoded once: building a body scales and compresses its images.
    counted = Counter(id(request) for request in requests)
    for request in {id(request): request for request in requests}.values():
        num = counted[id(request)]
        body = request.body(profile, "json_schema" if response_format == "auto" else response_format)
        sent, received = count_body_tokens(body, profile)
        tokens_in, tokens_out = tokens_in + num * sent, tokens_out + num * received
        size += num * len(json.dumps(body))
    return Totals(Usage(input_tokens=tokens_in, output_tokens=tokens_out), size)


def count_worst(config: LlmConfig, name: str, max_usage: Usage, *, num: int) -> tuple[int, float | None]:
    """Return the most calls of one profile for `num` requests, and their price if every attempt is billed.

    Args:
        max_usage: tokens of all `num` requests together, each sent once.

    """
    profile = config.profiles[name]
    if not num:
        return 0, 0.0
    repairs = math.ceil(config.max_repair_fraction * num)
    # Every request and repair takes all of its attempts, at the average size of the requests.
    factor = profile.max_attempts * (num + repairs)
    usage = Usage(
        input_tokens=math.ceil(factor * max_usage.input_tokens / num) + profile.max_attempts * repairs * REPAIR_TOKENS,
        output_tokens=math.ceil(factor * max_usage.output_tokens / num),
    )
    # At worst every response format is probed, each with all attempts.
    probes = len(RESPONSE_FORMATS) * profile.max_attempts if profile.capabilities.response_format == "auto" else 0
    usage = replace(
        usage,
        input_tokens=usage.input_tokens + probes * REPAIR_TOKENS,
        output_tokens=usage.output_tokens + probes * profile.max_output_tokens,
    )
    return factor + probes, compute_cost(profile.prices, usage, is_batch=False)[0]
