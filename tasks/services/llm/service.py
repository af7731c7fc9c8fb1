"""The LLM service: validated replies to requests, with cache, fallback chain, repair, budget and ledger."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from tasks.errors import LikenessError, ReplyInvalid
from tasks.services.llm.budget.ledger import Ledger, LedgerRow, compute_cost
from tasks.services.llm.budget.rate_limit import WINDOW_SECONDS, RateLimiter
from tasks.services.llm.budget.spending_cap import Budget
from tasks.services.llm.chat.body import ChatBody, count_body_tokens
from tasks.services.llm.chat.capability_probe import probe_response_format
from tasks.services.llm.chat.completion import ChatCompletion, Usage, bound_usage, parse_completion
from tasks.services.llm.chat.image_urls import CALL_SECONDS, presign_images
from tasks.services.llm.chat.json_schema import parse_reply
from tasks.services.llm.chat.request import Answer, RequestSpec, T
from tasks.services.llm.chat.response_format import read_content
from tasks.services.llm.chat.transport import complete, complete_streaming, make_client, translated
from tasks.services.llm.config import LlmConfig, ProfileConfig, ResponseFormat
from tasks.services.llm.errors import may_be_billed
from tasks.services.llm.reply_cache import CachedReply, Refusal, check_refusal, find_record, put_record
from tasks.services.llm.retries import CircuitBreaker, call_with_retries, current_signal, outside_of_pool
from tasks.services.llm.single_flight import SingleFlight, run_once
from tasks.services.store.base import Store

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalServices:
    """Local services, for profiles without a provider."""

    start_server: Callable[[], str] | None = None
    """Starts the mini vision server and returns its base URL."""
    batch_folder: Path = Path("batches")
    """Working folder of local batch jobs."""


class LlmService:
    """Sends requests to the profiles of roles: one client per profile, replies cached by the request's digest."""

    def __init__(
        self,
        config: LlmConfig,
        *,
        store: Store,
        ledger: Ledger,
        budget: Budget | None = None,
        local: LocalServices | None = None,
    ) -> None:
        self.config = config
        self.local = local or LocalServices()
        self.store = store
        self.ledger = ledger
        self.budget = budget or Budget()
        self.clients: dict[str, OpenAI] = {}
        self.rate_limiters: dict[str, RateLimiter] = {}
        self.circuits: dict[str, CircuitBreaker] = {}
        self.flights = SingleFlight()
        self.response_formats: dict[str, ResponseFormat] = {}
        self.substitutes: set[tuple[str, str]] = set()  # (profile, served model) that were warned about
        self.lock = threading.RLock()
        # Held across the calls of a capability probe, so a lock of its own: clients and circuits stay available.
        self.probe_lock = threading.RLock()

    def profile(self, role: str) -> ProfileConfig:
        """Return a role's first profile."""
        return self.config.profile(role)

    def client(self, name: str) -> "OpenAI":
        """Return the openai client of a profile, made once."""
        with self.lock:
            if name not in self.clients:
                self.clients[name] = make_client(self.config.profiles[name], start_local=self.local.start_server)
            return self.clients[name]

    def response_format(self, name: str) -> ResponseFormat:
        """Return a profile's response format, probed on first use where the configuration says `auto`."""
        # A rejected probe is a finding; it must not stop the pool in which this thread works.
        with self.probe_lock, outside_of_pool():
            if name not in self.response_formats:
                profile = self.config.profiles[name]
                known = profile.capabilities.response_format
                row = LedgerRow("probe", name, profile.model, outcome="")
                self.response_formats[name] = (
                    probe_response_format(profile, store=self.store, call=lambda body: self.call(body, row=row))
                    if known == "auto"
                    else known
                )
            return self.response_formats[name]

    def circuit(self, name: str) -> CircuitBreaker:
        """Return a profile's circuit breaker."""
        with self.lock:
            return self.circuits.setdefault(name, CircuitBreaker())

    def rate_limiter(self, name: str) -> RateLimiter:
        """Return a profile's rate limiter, shared by all of its calls in this process."""
        with self.lock:
            profile = self.config.profiles[name]
            return self.rate_limiters.setdefault(
                name, RateLimiter(profile.requests_per_minute, profile.tokens_per_minute)
            )

    def close(self) -> None:
        """Close all connections."""
        for client in self.clients.values():
            client.close()

    def ask(
        self,
        spec: RequestSpec[T],
        *,
        role: str,
        should_escalate: Callable[[T], str | None] = lambda reply: None,
        first_fallback: int = 0,
    ) -> Answer[T]:
        """Return a role's validated reply, from the first profile of its fallback chain whose reply is accepted.

        Args:
            should_escalate: returns why a valid reply should be asked of the next profile, or None.
            first_fallback: index in the fallback chain to begin at, clamped to the last profile.

        Raises:
            ServiceUnavailable: no answer within the profile's attempts and time.
            ReplyInvalid: no profile gave a valid reply, each after at most one repair.
            ConfigError: key or model is refused.
            BudgetExceeded: the next call could pass the cap.

        """
        names = self.config.fallback_chain(role)
        doubtful: Answer[T] | None = None
        reason = ""
        for index, name in list(enumerate(names))[min(first_fallback, len(names) - 1) :]:
            is_last = index == len(names) - 1
            model = self.config.profiles[name].model
            row = LedgerRow(role, name, model, outcome="", fallback_index=index, reason=reason)
            try:
                # A refusal of the last profile is not cached: nothing could stand in for it for the next day.
                ask = partial(self._ask_with_repair, spec, row, not is_last)
                answer = self.find_or_ask(spec, row, ask, num_calls=2)
            except ReplyInvalid as error:
                if is_last and doubtful is None:  # a valid reply, though doubtful, is better than none
                    raise
                reason = str(error)
                continue
            reason = should_escalate(answer.reply) or ""
            if not reason:
                return answer
            doubtful = answer
        assert doubtful is not None
        return replace(doubtful, reason=reason)

    def find_or_ask(
        self, spec: RequestSpec[T], row: LedgerRow, ask: Callable[[], Answer[T]], *, num_calls: int
    ) -> Answer[T]:
        """Return a cached reply, or that of `ask`, which makes at most `num_calls` calls.

        Of all processes that want the same reply, one asks, and the others wait for as long as that may take.
        """
        find = partial(self.find_cached, spec, name=row.profile, role=row.role)
        if (cached := find()) is not None:
            return replace(cached, fallback_index=row.fallback_index, reason=row.reason)
        key = self.cache_key(spec, row.profile)
        patience = num_calls * (WINDOW_SECONDS + self.config.profiles[row.profile].timeout_seconds)
        once = partial(run_once, self.store, key, ask, find=find, max_wait_seconds=patience)
        answer, is_own = self.flights.run(key, once)
        if not is_own:  # joined another thread's call, which recorded the cost
            self.ledger.record(replace(row, outcome="cached", served_model=answer.served_model))
        return replace(answer, fallback_index=row.fallback_index, reason=row.reason)

    def _ask_with_repair(self, spec: RequestSpec[T], row: LedgerRow, should_cache_refusal: bool) -> Answer[T]:
        """Ask one profile, and repair an invalid reply once by a second request that names the fault."""
        refusal_key = self.cache_key(spec, row.profile).replace("/replies/", "/refusals/")
        # Before the body, since `response_format` may probe the provider, which costs a call.
        if should_cache_refusal:
            check_refusal(self.store, refusal_key)
        body = spec.body(self.config.profiles[row.profile], self.response_format(row.profile))
        try:
            try:
                return self._ask_once(spec, body, row=row)
            except ReplyInvalid as error:
                # Repairs are bounded per pool: a model that never fits the schema must not double the bill.
                if not current_signal().take_repair():
                    raise
                note = f"Your last reply could not be used: {error}. Reply again, with JSON that fits the schema."
                body["messages"].append({"role": "user", "content": note})
            return self._ask_once(spec, body, row=row)
        except ReplyInvalid as error:
            if should_cache_refusal:
                put_record(self.store, Refusal(key=refusal_key, reason=str(error), at=time.time()))
            raise

    def _ask_once(self, spec: RequestSpec[T], body: ChatBody, *, row: LedgerRow) -> Answer[T]:
        started = time.monotonic()
        completion = self.send(body, row=row)
        return self.accept(spec, completion, row=replace(row, seconds=time.monotonic() - started))

    def send(
        self,
        body: ChatBody,
        *,
        row: LedgerRow,
        on_text: Callable[[str], None] | None = None,
        create: Callable[..., dict[str, object]] = complete,
    ) -> ChatCompletion:
        """Send a body within rate limits and budget and return the completion.

        Failed attempts are recorded in the ledger; recording the completion is left to the caller. Worst-case cost
        is reserved before each attempt, since an attempt that is cut off may be billed too.

        Args:
            on_text: receives the streamed text; such a call is not retried, since a retry would show text twice.
            create: makes the call; takes client, body and `timeout_seconds`.

        """
        profile = self.config.profiles[row.profile]
        # Counted while images are inline: a presigned URL has no pixels to count.
        max_usage = self.reserve_tokens(row.profile, body)
        if profile.image_urls == "presigned":
            body = presign_images(body, self.store, seconds=CALL_SECONDS)

        def attempt(timeout: float) -> ChatCompletion:
            client = self.client(row.profile)
            with self.reserved(row, max_usage) as finish:
                if on_text is None:
                    raw = create(client, body, timeout_seconds=timeout)
                else:
                    raw = complete_streaming(client, body, timeout_seconds=timeout, on_text=on_text)
                return finish(raw)

        # Waits before the call's timeout starts. Retries don't wait here: they follow the provider's Retry-After.
        self.rate_limiter(row.profile).wait(max_usage.input_tokens)
        attempts = 1 if on_text is not None else profile.max_attempts
        return call_with_retries(attempt, profile, circuit=self.circuit(row.profile), max_attempts=attempts)

    def reserve_tokens(self, name: str, body: ChatBody) -> Usage:
        """Return an upper estimate of the tokens of a request and its reply."""
        tokens_in, tokens_out = count_body_tokens(body, self.config.profiles[name])
        return Usage(input_tokens=tokens_in, output_tokens=tokens_out)

    @contextmanager
    def reserved(self, row: LedgerRow, max_usage: Usage) -> Iterator[Callable[[object], ChatCompletion]]:
        """Reserve one attempt's worst-case cost, then reconcile it with the outcome.

        Yields a function that turns the raw reply into a completion and reconciles the reservation.
        """
        profile = self.config.profiles[row.profile]
        cost, date = compute_cost(profile.prices, max_usage, is_batch=False)
        worst = cost or 0.0  # without a price nothing is reserved; LlmConfig refuses a cap then
        reservation = self.budget.reserve(worst)
        lost = replace(row, usage=max_usage, cost_usd=cost, price_date=date)

        def finish(raw: object) -> ChatCompletion:
            # Usage is bounded before it is priced: a false report must neither free nor exhaust the budget.
            completion = bound_usage(parse_completion(raw), max_usage, worst_usd=cost)
            spent, _ = self.price(row.profile, completion, is_batch=False)
            self.budget.reconcile(reservation, spent=worst if spent is None else spent)
            return completion

        try:
            with translated(profile):
                yield finish
        except KeyboardInterrupt:  # not reconciled: what was generated may be billed, so the cost stays reserved
            self.ledger.record(replace(lost, outcome="cancelled", usage_fault="the call was interrupted"))
            raise
        except LikenessError as error:
            if may_be_billed(error):  # not reconciled either: the reservation stands for a reply that never arrived
                self.ledger.record(replace(lost, outcome=error.kind, usage_fault="no reply was received"))
            else:
                self.budget.reconcile(reservation, spent=0.0)
                self.ledger.record(replace(row, outcome=error.kind))
            raise
        except Exception as error:  # such as a closed pipe in `on_text`; not reconciled: the attempt was sent
            self.ledger.record(replace(lost, outcome=type(error).__name__, usage_fault="the reply was not read"))
            raise

    def accept(
        self,
        spec: RequestSpec[T],
        completion: ChatCompletion,
        *,
        row: LedgerRow,
        response_format: ResponseFormat | None = None,
        called: tuple[str, ...] = (),
    ) -> Answer[T]:
        """Record a completion, validate it, and cache it.

        Args:
            response_format: response format that was requested; None: the profile's.
            called: names of the tools that were called before.

        Raises:
            ReplyInvalid: the reply can't be used; it is recorded nevertheless, since it was paid for.

        """
        requested = response_format or self.response_format(row.profile)
        row = replace(self.fill_row(completion, row), response_format=requested)
        content = read_content(completion, requested)
        try:
            parsed = parse_reply(spec.reply, content, completion)
        except ReplyInvalid:
            self.ledger.record(replace(row, outcome="invalid"))
            raise
        kept = CachedReply(
            key=self.cache_key(spec, row.profile), content=content or "", served_model=completion.model,
            reasoning=completion.reasoning, citations=completion.citations, called=called,
        )  # fmt: skip
        # Cached before it is recorded: after a crash in between, a rerun finds the reply instead of paying again.
        put_record(self.store, kept)
        self.ledger.record(replace(row, outcome="ok"))
        return replace(make_answer(parsed, kept, row.profile), fallback_index=row.fallback_index, reason=row.reason)

    def fill_row(self, completion: ChatCompletion, row: LedgerRow) -> LedgerRow:
        """Return a ledger row with a completion's usage and cost."""
        cost, date = self.price(row.profile, completion, is_batch=row.is_batch)
        return replace(
            row, served_model=completion.model, usage=completion.usage, usage_fault=completion.usage_fault,
            cost_usd=cost, price_date=date, seconds=round(row.seconds, 3),
        )  # fmt: skip

    def find_cached(self, spec: RequestSpec[T], *, name: str, role: str) -> Answer[T] | None:
        """Return a cached reply, and record that nothing was paid."""
        found = self.read_cached(spec, name=name)
        if found is not None:
            model = self.config.profiles[name].model
            self.ledger.record(LedgerRow(role, name, model, outcome="cached", served_model=found.served_model))
        return found

    def read_cached(self, spec: RequestSpec[T], *, name: str) -> Answer[T] | None:
        """Return the cached reply of a request; None where there is none, or it no longer validates."""
        kept = find_record(self.store, CachedReply, self.cache_key(spec, name))
        try:
            return None if kept is None else make_answer(parse_reply(spec.reply, kept.content), kept, name)
        except ReplyInvalid:
            # The key covers the strict schema, which has no bounds: these may have become stricter since.
            return None

    def cache_key(self, spec: RequestSpec[BaseModel], name: str) -> str:
        """Return the store key of a profile's reply to a request."""
        return f"llm/replies/{spec.compute_key(self.config.profiles[name])}.json"

    def price(self, name: str, completion: ChatCompletion, *, is_batch: bool) -> tuple[float | None, str]:
        """Return a completion's cost in USD at the prices of the model that served it, and the price's source."""
        profile, served = self.config.profiles[name], completion.model
        prices = profile.prices
        if served and not profile.is_served(served):
            if (name, served) not in self.substitutes:
                self.substitutes.add((name, served))
                log.warning("requested %s, served by %s: its grades are not comparable", profile.model, served)
            # A substitute has its own price: that of a profile for it, else unknown, except on the local mini server.
            others = [other.prices for other in self.config.profiles.values() if other.is_served(served)]
            prices = others[0] if others else (prices if profile.base_url is None else None)
        return compute_cost(prices, completion.usage, is_batch=is_batch)

    def is_comparable(self, answer: Answer[T]) -> bool:
        """Whether the requested model served the reply, so that its grades are comparable with others."""
        return self.config.profiles[answer.profile].is_served(answer.served_model)

    def call(self, body: ChatBody, *, row: LedgerRow) -> ChatCompletion:
        """Send a body and record the completion, uncached: for calls without a RequestSpec, such as probes."""
        completion = self.send(body, row=row)
        self.record_completion(completion, row=row)
        return completion

    def record_completion(self, completion: ChatCompletion, *, row: LedgerRow) -> None:
        """Record a completion that is neither validated nor cached."""
        self.ledger.record(replace(self.fill_row(completion, row), outcome="invalid" if completion.problem else "ok"))


def make_answer(reply: T, kept: CachedReply, profile: str) -> Answer[T]:
    """Return a validated reply with the metadata cached beside it."""
    return Answer(
        reply, profile, kept.served_model, reasoning=kept.reasoning, citations=kept.citations, called=kept.called
    )
