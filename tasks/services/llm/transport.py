"""Talk to a provider through the `openai` package: one retry layer, one deadline, our errors."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tasks.errors import BudgetExceeded, ConfigError, LikenessError, ServiceUnavailable
from tasks.services.llm.config import ProfileConfig

LONGEST_PAUSE_SECONDS = 60.0
# Words by which providers say that money, not pace, is the limit: waiting would not help.
QUOTA_WORDS = ("insufficient_quota", "quota", "credit", "billing", "spending limit")


def make_client(profile: ProfileConfig, *, start_local: Callable[[], str] | None) -> Any:
    """Return an openai client. Raises ConfigError where the key is not in the environment."""
    import openai

    base_url = profile.base_url
    if base_url is None:
        if start_local is None:
            raise ConfigError("this profile needs the mini vision server, which is not running here")
        base_url = start_local()
    # Retries belong to one layer, ours: the SDK would post a batch twice without a way to tell.
    return openai.OpenAI(base_url=base_url, api_key=read_key(profile), max_retries=0)


def read_key(profile: ProfileConfig) -> str:
    """Return the profile's key. Raises ConfigError where it is not in the environment."""
    if not profile.api_key_variable:
        return "local"
    key = os.environ.get(profile.api_key_variable, "")
    if not key:
        raise ConfigError(f"{profile.api_key_variable} is not set; export it, or use llm=local with the drawn world")
    return key


def call_with_retries(
    call: Callable[[float], Any],
    profile: ProfileConfig,
    *,
    on_failure: Callable[[LikenessError], None] = lambda error: None,
) -> Any:
    """Call a provider until it answers, with growing pauses, within the profile's total time."""
    deadline = time.monotonic() + profile.timeout_seconds
    for attempt in range(1, profile.max_attempts + 1):
        try:
            with translated(profile):
                return call(max(0.1, deadline - time.monotonic()))
        except LikenessError as error:
            on_failure(error)
            if not error.is_retryable or attempt == profile.max_attempts:
                raise
            pause = choose_pause(error, attempt)
            if time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def choose_pause(error: LikenessError, attempt: int) -> float:
    """Return seconds to wait: what the provider asks for, else doubling with jitter."""
    response = getattr(error.__cause__, "response", None)
    header = response.headers.get("retry-after", "") if response is not None else ""
    try:
        asked = float(header)
    except ValueError:
        asked = -1.0
    if asked >= 0:  # nan and negative numbers are no answer
        return asked
    return float(min(LONGEST_PAUSE_SECONDS, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))


def is_surely_unpaid(error: LikenessError) -> bool:
    """Whether a failed call can't have been billed: it was refused, or nobody was there."""
    import openai

    cause = error.__cause__
    if isinstance(cause, openai.APITimeoutError):
        return False
    if isinstance(cause, openai.APIConnectionError):
        return "refused" in repr(cause.__cause__).lower()
    return isinstance(cause, openai.APIStatusError) and cause.status_code < 500


@contextmanager
def translated(profile: ProfileConfig) -> Iterator[None]:
    """Turn the SDK's errors into ours."""
    import openai

    where = profile.base_url or "the mini vision server"
    try:
        yield
    except openai.APIConnectionError as error:
        raise ServiceUnavailable(f"{where} does not answer: {error}; run again to go on") from error
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise ConfigError(f"{where} refuses the key in {profile.api_key_variable}") from error
    except openai.NotFoundError as error:
        raise ConfigError(f"{where} does not serve {profile.model}; `likeness doctor` lists what it serves") from error
    except openai.BadRequestError as error:
        raise ConfigError(f"{where} refuses the request: {error.message[:200]}") from error
    except openai.RateLimitError as error:
        if any(word in str(error).lower() for word in QUOTA_WORDS):
            raise BudgetExceeded(f"the quota at {where} is used up; what was answered is kept") from error
        raise ServiceUnavailable(f"{where} asks to wait (rate limit)") from error
    except openai.APIStatusError as error:
        if error.status_code == 402:
            raise BudgetExceeded(f"{where} wants to be paid first; what was answered is kept") from error
        raise ServiceUnavailable(f"{where} answered {error.status_code}") from error
    except openai.OpenAIError as error:
        raise ServiceUnavailable(f"{where} sent what can't be read: {error}") from error
