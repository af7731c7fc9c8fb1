"""Many requests one by one, several at once."""

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

from tasks.errors import ReplyInvalid
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.chat.retries import map_in_pool
from tasks.services.llm.service import Answer, LlmService

Answers = dict[str, Answer[Any]]
Specs = dict[str, RequestSpec[Any]]


def ask_each(
    specs: Specs,
    *,
    llm: LlmService,
    role: str,
    on_progress: Callable[[int, int], None],
    first_fallback: int = 0,
    max_failures: int | None = None,
) -> tuple[Answers, dict[str, str]]:
    """Return answers and reasons for what has none, by the caller's names.

    Args:
        max_failures: with more of them than this, the rest is not asked: what is answered would be of no use.

    """
    answers: Answers = {}
    failures: dict[str, str] = {}
    unusable: list[str] = []

    def ask(name: str) -> Answer[Any] | str:
        if max_failures is not None and len(unusable) > max_failures:
            return f"not asked: {len(unusable)} other replies could not be used, for example: {unusable[0]}"
        try:
            return llm.ask(specs[name], role=role, first_fallback=first_fallback)
        except ReplyInvalid as error:
            unusable.append(str(error))
            return str(error)

    outcomes = map_in_pool(
        ask, specs, concurrency=llm.profile(role).concurrency, num_repairs=count_repairs(llm, len(specs))
    )
    with closing(outcomes):
        for name, outcome in zip(specs, outcomes, strict=True):
            if isinstance(outcome, str):
                failures[name] = outcome
            else:
                answers[name] = outcome
            on_progress(len(answers) + len(failures), len(specs))
    return answers, failures


def count_repairs(llm: LlmService, num_questions: int) -> int:
    """Return how many unusable replies may be asked for once more, for so many questions."""
    return math.ceil(llm.config.max_repair_fraction * num_questions)
