"""What requests would cost, before any is sent."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.services.llm.batch import MOST_BYTES
from tasks.services.llm.completion import Usage
from tasks.services.llm.config import LlmConfig
from tasks.services.llm.ledger import compute_cost
from tasks.services.llm.requests import RequestSpec, count_body_tokens

SHORT_REPLY_TOKENS = 120


@dataclass(frozen=True)
class CallEstimate:
    """What a role would take."""

    role: str
    profile: str
    calls: int
    input_tokens: int
    low_usd: float | None
    """With replies of 120 tokens; None where no price is known."""
    high_usd: float | None
    """With replies as long as they may be."""
    is_batch: bool
    largest_file_bytes: int


def estimate_calls(
    config: LlmConfig, role: str, requests: Sequence[RequestSpec[Any]], *, is_batch: bool
) -> CallEstimate:
    """Return what a role's first profile would take for these requests."""
    name = config.rungs(role)[0]
    profile = config.profiles[name]
    structure = profile.capabilities.structure
    low, high, size = Usage(), Usage(), 0
    counted = Counter(id(request) for request in requests)
    for request in {id(request): request for request in requests}.values():
        num = counted[id(request)]
        body = request.body(profile, "json_schema" if structure == "auto" else structure)
        tokens, most = count_body_tokens(body, profile)
        low = Usage(low.input_tokens + num * tokens, output_tokens=low.output_tokens + num * SHORT_REPLY_TOKENS)
        high = Usage(low.input_tokens, output_tokens=high.output_tokens + num * most)
        size += num * len(json.dumps(body))
    return CallEstimate(
        role=role,
        profile=name,
        calls=len(requests),
        input_tokens=low.input_tokens,
        low_usd=compute_cost(profile.prices, low, is_batch=is_batch)[0],
        high_usd=compute_cost(profile.prices, high, is_batch=is_batch)[0],
        is_batch=is_batch,
        largest_file_bytes=min(size, MOST_BYTES),
    )
