"""Ask a model and get a validated record back: cache, retries, deadline and ledger in one place."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tasks.errors import BudgetExceeded, ConfigError, LikenessError, ReplyInvalid, ServiceUnavailable
from tasks.services.llm.config import LlmConfig, ProfileConfig
from tasks.services.llm.ledger import Ledger
from tasks.services.llm.requests import RequestSpec
from tasks.services.llm.schema import parse_reply
from tasks.services.store import Store

T = TypeVar("T", bound=BaseModel)
LONGEST_WAIT_SECONDS = 60.0


class CachedReply(BaseModel):
    """A validated reply in the store."""

    content: str
    served_model: str
    tokens: tuple[int, int]


class LlmService:
    """Roles, their profiles, one client each; replies are kept in the store by content."""

    def __init__(
        self,
        config: LlmConfig,
        *,
        store: Store,
        ledger: Ledger,
        start_local: Callable[[], str] | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.ledger = ledger
        self.start_local = start_local
        self.clients: dict[str, Any] = {}
        self.lock = threading.Lock()

    def profile(self, role: str) -> ProfileConfig:
        """Return the profile of a role."""
        return self.config.profile(role)

    def client(self, role: str) -> Any:
        """Return the openai client of a role, made once per profile."""
        name = str(getattr(self.config, role))
        with self.lock:
            if name not in self.clients:
                self.clients[name] = make_client(self.profile(role), start_local=self.start_local)
            return self.clients[name]

    def close(self) -> None:
        """Close all connections."""
        for client in self.clients.values():
            client.close()

    def find_cached(self, spec: RequestSpec, *, role: str, reply: type[T]) -> tuple[T, str] | None:
        """Return a kept reply and the model that gave it, and book that nothing was paid."""
        found = self.read_kept(spec, role=role, reply=reply)
        if found is not None:
            self.ledger.book(self.profile(role), role=role, outcome="cached", served_model=found[1])
        return found

    def read_kept(self, spec: RequestSpec, *, role: str, reply: type[T]) -> tuple[T, str] | None:
        """Return a validated reply in the store and the model that gave it."""
        data = self.store.find_bytes(self._cache_key(spec, role))
        if data is None:
            return None
        try:
            cached = CachedReply.model_validate_json(data)
            parsed = parse_reply(reply, cached.content, finish_reason="stop", refusal=None)
        except (ValidationError, ReplyInvalid):
            return None
        return parsed, cached.served_model

    def ask(self, spec: RequestSpec, *, role: str, reply: type[T]) -> tuple[T, str]:
        """Return the validated reply and the model that gave it.

        Raises:
            ServiceUnavailable: no answer within the profile's attempts and time.
            ReplyInvalid: no answer that fits, asked twice.
            ConfigError: key or model is refused.

        """
        cached = self.find_cached(spec, role=role, reply=reply)
        if cached is not None:
            return cached
        profile = self.profile(role)
        body = spec.body(profile)
        try:
            return self._ask_once(spec, body, role=role, reply=reply)
        except ReplyInvalid as error:
            note = f"Your last reply could not be used: {error}. Reply again, with JSON that fits the schema."
            body["messages"].append({"role": "user", "content": note})
            return self._ask_once(spec, body, role=role, reply=reply)

    def _ask_once(self, spec: RequestSpec, body: dict[str, Any], *, role: str, reply: type[T]) -> tuple[T, str]:
        profile = self.profile(role)
        started = time.monotonic()
        completion = call_with_retries(
            lambda timeout: self.client(role).chat.completions.create(**body, timeout=timeout),
            profile,
            on_failure=lambda name: self.ledger.book(profile, role=role, outcome=name),
        )
        raw = completion.model_dump()
        return self.accept(spec, raw, role=role, reply=reply, seconds=time.monotonic() - started)

    def accept(
        self,
        spec: RequestSpec,
        completion: dict[str, Any],
        *,
        role: str,
        reply: type[T],
        is_batch: bool = False,
        seconds: float = 0.0,
    ) -> tuple[T, str]:
        """Book a completion, validate it, and keep it. Raises ReplyInvalid."""
        usage = completion.get("usage") or {}
        tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        served = str(completion.get("model") or "")
        booked: dict[str, Any] = {
            "role": role, "served_model": served, "tokens": tokens, "is_batch": is_batch, "seconds": seconds,
        }  # fmt: skip
        choices = completion.get("choices") or [{}]
        message = choices[0].get("message") or {}
        content = message.get("content")
        try:
            parsed = parse_reply(
                reply,
                content,
                finish_reason=choices[0].get("finish_reason"),
                refusal=message.get("refusal"),
            )
        except ReplyInvalid:
            self.ledger.book(self.profile(role), outcome="invalid", **booked)
            raise
        # Stored before it is booked: a run that ends in between must not pay for it again.
        kept = CachedReply(content=content, served_model=served, tokens=tokens)
        self.store.put_bytes(self._cache_key(spec, role), kept.model_dump_json().encode())
        self.ledger.book(self.profile(role), outcome="ok", **booked)
        return parsed, served

    def _cache_key(self, spec: RequestSpec, role: str) -> str:
        return f"llm/replies/{spec.compute_key(self.profile(role))}.json"


def make_client(profile: ProfileConfig, *, start_local: Callable[[], str] | None) -> Any:
    """Return an openai client. Raises ConfigError where the key is not in the environment."""
    import openai

    base_url = profile.base_url
    if base_url is None:
        if start_local is None:
            raise ConfigError("this profile needs the mini vision server, which is not running here")
        base_url = start_local()
    key = "local"
    if profile.api_key_variable:
        key = os.environ.get(profile.api_key_variable, "")
        if not key:
            raise ConfigError(
                f"{profile.api_key_variable} is not set; export it, or use llm=local with the drawn world"
            )
    # Retries belong to one layer, ours: the SDK would post a batch twice without a way to tell.
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)


def call_with_retries(
    call: Callable[[float], Any],
    profile: ProfileConfig,
    *,
    on_failure: Callable[[str], None] = lambda name: None,
) -> Any:
    """Call a provider until it answers, with growing pauses, within the profile's total time."""
    deadline = time.monotonic() + profile.timeout_seconds
    for attempt in range(1, profile.max_attempts + 1):
        try:
            with translated(profile):
                return call(max(0.1, deadline - time.monotonic()))
        except LikenessError as error:
            on_failure(type(error).__name__)
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
        return max(0.0, float(header))
    except ValueError:
        return float(min(LONGEST_WAIT_SECONDS, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))


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
        raise ConfigError(f"{where} does not serve {profile.model}; see its list of models") from error
    except openai.BadRequestError as error:
        raise ConfigError(f"{where} refuses the request: {error.message[:200]}") from error
    except openai.RateLimitError as error:
        if "quota" in str(error).lower():
            raise BudgetExceeded(f"the quota at {where} is used up") from error
        raise ServiceUnavailable(f"{where} asks to wait (rate limit)") from error
    except openai.APIStatusError as error:
        raise ServiceUnavailable(f"{where} answered {error.status_code}") from error
