"""Put questions to a judge, one by one or as a batch job."""

import math
from collections.abc import Callable

from tasks.errors import ReplyInvalid
from tasks.scoring.config import ScoringConfig
from tasks.services.llm.batch.jobs import BatchOptions, ask_batch
from tasks.services.llm.executor import Answers, Specs, ask_each
from tasks.services.llm.service import LlmService
from tasks.stage.cache import StageFolder


def ask_judge(
    specs: Specs,
    config: ScoringConfig,
    *,
    llm: LlmService,
    folder: StageFolder,
    role: str = "judge",
    on_progress: Callable[[int, int], None],
) -> tuple[Answers, dict[str, str]]:
    """Return answers and failures by the questions' names.

    Raises:
        ReplyInvalid: more questions failed than `scoring.max_failed_share` allows.

    """
    on_progress(0, len(specs))
    has_batches = llm.profile(role).capabilities.batch != "none"
    if config.executor == "batch" and has_batches:
        options = BatchOptions(
            state_prefix=f"{folder.prefix}/batches/{role}",
            poll_seconds=config.poll_seconds,
            max_wait_seconds=config.max_wait_seconds,
            deadline_seconds=config.deadline_seconds,
        )
        answers, failures = ask_batch(llm, specs, options, role=role, on_progress=on_progress)
    else:
        max_failures = math.floor(config.max_failed_share * len(specs))
        answers, failures = ask_each(specs, llm=llm, role=role, on_progress=on_progress, max_failures=max_failures)
    if len(failures) > config.max_failed_share * len(specs):
        example = next(iter(failures.values()))
        raise ReplyInvalid(f"{len(failures)} of {len(specs)} questions got no grade: {example}; run again to ask anew")
    return answers, failures
