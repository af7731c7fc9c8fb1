"""Send many requests as concurrent synchronous calls."""

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tasks.errors import ReplyInvalid
from tasks.services.llm.chat.request import Answer, RequestSpec
from tasks.services.llm.retries import map_in_pool
from tasks.services.llm.service import LlmService

Answers = dict[str, Answer[Any]]
"""Answers by the caller's names, which tell it their types."""
Specs = Mapping[str, RequestSpec[BaseModel]]


def ignore_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class AskOptions:
    """Options of a set of requests to one role."""

    role: str
    on_progress: Callable[[int, int], None] = ignore_progress
    """Called with the numbers of completed and of all requests."""
    first_fallback: int = 0
    """Index in the fallback chain to begin at."""
    max_failures: int | None = None
    """Beyond this number of failures, no further request is sent. Calls only."""


def ask_each(llm: LlmService, specs: Specs, options: AskOptions) -> tuple[Answers, dict[str, str]]:
    """Return answers, and the reasons for requests without one, both by the caller's names.

    An invalid reply fails its request alone; any other error stops all workers and is raised.
    """
    answers: Answers = {}
    failures: dict[str, str] = {}
    unusable: list[str] = []  # shared by the workers; append is atomic

    def ask(name: str) -> Answer[BaseModel] | str:
        if options.max_failures is not None and len(unusable) > options.max_failures:
            return f"not asked: {len(unusable)} other replies could not be used, for example: {unusable[0]}"
        try:
            return llm.ask(specs[name], role=options.role, first_fallback=options.first_fallback)
        except ReplyInvalid as error:
            unusable.append(str(error))
            return str(error)

    outcomes = map_in_pool(
        ask, specs, concurrency=llm.profile(options.role).concurrency, num_repairs=count_repairs(llm, len(specs))
    )
    # Closing the generator stops the workers where the loop is left early: on_progress raises when a run stops.
    with closing(outcomes):
        for name, outcome in zip(specs, outcomes, strict=True):
            if isinstance(outcome, str):
                failures[name] = outcome
            else:
                answers[name] = outcome
            options.on_progress(len(answers) + len(failures), len(specs))
    return answers, failures


def count_repairs(llm: LlmService, num_questions: int) -> int:
    """Return how many invalid replies may be repaired, for a number of requests."""
    return math.ceil(llm.config.max_repair_fraction * num_questions)
