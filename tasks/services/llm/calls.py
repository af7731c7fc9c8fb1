"""Many requests one by one, several at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tasks.errors import ReplyInvalid
from tasks.services.llm.client import Answer, LlmService
from tasks.services.llm.requests import RequestSpec

Answers = dict[str, Answer[Any]]
Specs = dict[str, RequestSpec[Any]]


def ask_each(
    specs: Specs, *, llm: LlmService, role: str, on_progress: Callable[[int, int], None], first_rung: int = 0
) -> tuple[Answers, dict[str, str]]:
    """Return answers and reasons for what has none, by the caller's names."""
    answers: Answers = {}
    failures: dict[str, str] = {}

    def ask(name: str) -> Answer[Any] | str:
        try:
            return llm.ask(specs[name], role=role, first_rung=first_rung)
        except ReplyInvalid as error:
            return str(error)

    with ThreadPoolExecutor(llm.profile(role).concurrency) as pool:
        for name, outcome in zip(specs, pool.map(ask, specs), strict=True):
            if isinstance(outcome, str):
                failures[name] = outcome
            else:
                answers[name] = outcome
            on_progress(len(answers) + len(failures), len(specs))
    return answers, failures
