"""Ask a role and get a validated record back: cache, rungs, repair, budget and ledger in one place."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from pydantic import BaseModel, ValidationError

from tasks.errors import LikenessError, ReplyInvalid
from tasks.services.llm.config import LlmConfig, ProfileConfig, Structure
from tasks.services.llm.dialects import read_content, read_trace
from tasks.services.llm.ledger import Budget, Ledger, LedgerRow, Usage, compute_cost, read_usage
from tasks.services.llm.pacing import Pace
from tasks.services.llm.pictures import CALL_SECONDS, publish_pictures
from tasks.services.llm.probing import find_structure
from tasks.services.llm.requests import RequestSpec, T, count_body_tokens
from tasks.services.llm.schema import parse_reply
from tasks.services.llm.transport import (
    call_with_retries,
    complete,
    complete_streaming,
    is_surely_unpaid,
    make_client,
)
from tasks.services.store import Store

log = logging.getLogger(__name__)
REFUSAL_DAYS = 1.0


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A validated reply, and how it came about."""

    reply: T
    profile: str
    served_model: str
    rung: int = 0
    reason: str = ""
    """Why it was not asked of, or not taken from, the rung before."""
    trace: str = ""
    """What the model thought aloud, where its provider tells."""


class CachedReply(BaseModel):
    """A validated reply in the store."""

    content: str
    served_model: str
    trace: str = ""


class Refusal(BaseModel):
    """A reply that could not be used, so that the same profile isn't asked again at once."""

    reason: str
    at: float


class LlmService:
    """Roles, their profiles, one client each; replies are kept in the store by content."""

    def __init__(
        self,
        config: LlmConfig,
        *,
        store: Store,
        ledger: Ledger,
        budget: Budget | None = None,
        start_local: Callable[[], str] | None = None,
        batch_folder: Path = Path("batches"),
    ) -> None:
        self.config = config
        self.batch_folder = batch_folder
        self.store = store
        self.ledger = ledger
        self.budget = budget or Budget()
        self.start_local = start_local
        self.clients: dict[str, Any] = {}
        self.paces: dict[str, Pace] = {}
        self.structures: dict[str, Structure] = {}
        self.substitutes: set[tuple[str, str]] = set()
        self.lock = threading.RLock()

    def profile(self, role: str) -> ProfileConfig:
        """Return a role's first profile."""
        return self.config.profile(role)

    def client(self, name: str) -> Any:
        """Return the openai client of a profile, made once."""
        with self.lock:
            if name not in self.clients:
                self.clients[name] = make_client(self.config.profiles[name], start_local=self.start_local)
            return self.clients[name]

    def structure(self, name: str) -> Structure:
        """Return how a profile is asked for a schema; found out once where its YAML doesn't say."""
        with self.lock:
            if name not in self.structures:
                profile = self.config.profiles[name]
                known = profile.capabilities.structure
                row = LedgerRow("probe", name, profile.model, outcome="")
                self.structures[name] = (
                    find_structure(profile, store=self.store, call=lambda body: self.call(body, row=row))
                    if known == "auto"
                    else known
                )
            return self.structures[name]

    def pace(self, name: str) -> Pace:
        """Return what keeps a profile's calls within its limits a minute."""
        with self.lock:
            profile = self.config.profiles[name]
            return self.paces.setdefault(name, Pace(profile.requests_per_minute, profile.tokens_per_minute))

    def close(self) -> None:
        """Close all connections."""
        for client in self.clients.values():
            client.close()

    def ask(
        self,
        spec: RequestSpec[T],
        *,
        role: str,
        doubt: Callable[[T], str | None] = lambda reply: None,
        first_rung: int = 0,
    ) -> Answer[T]:
        """Return a role's validated reply: from the cheapest profile whose reply will do.

        Args:
            doubt: says why a valid reply should be asked of the next profile, or nothing.
            first_rung: where to begin; the last profile where there are fewer.

        Raises:
            ServiceUnavailable: no answer within the profile's attempts and time.
            ReplyInvalid: no profile gave an answer that fits, each asked twice.
            ConfigError: key or model is refused.
            BudgetExceeded: the next call could pass the cap.

        """
        names = self.config.rungs(role)
        doubtful: Answer[T] | None = None
        reason = ""
        for rung, name in list(enumerate(names))[min(first_rung, len(names) - 1) :]:
            is_last = rung == len(names) - 1
            try:
                answer = self._ask_rung(spec, name, role=role, rung=rung, reason=reason, is_refusal_kept=not is_last)
            except ReplyInvalid as error:
                if is_last and doubtful is None:
                    raise
                reason = str(error)
                continue
            reason = doubt(answer.reply) or ""
            if not reason:
                return answer
            doubtful = answer
        assert doubtful is not None
        return replace(doubtful, reason=reason)

    def _ask_rung(
        self, spec: RequestSpec[T], name: str, *, role: str, rung: int, reason: str, is_refusal_kept: bool
    ) -> Answer[T]:
        cached = self.find_cached(spec, name=name, role=role)
        if cached is not None:
            return replace(cached, rung=rung, reason=reason)
        refusal_key = self.cache_key(spec, name).replace("/replies/", "/refusals/")
        if is_refusal_kept:
            self._check_refusal(refusal_key)
        body = spec.body(self.config.profiles[name], self.structure(name))
        row = LedgerRow(role, name, body["model"], outcome="", rung=rung, reason=reason)
        try:
            return self._ask_once(spec, body, row=row)
        except ReplyInvalid as error:
            note = f"Your last reply could not be used: {error}. Reply again, with JSON that fits the schema."
            body["messages"].append({"role": "user", "content": note})
        try:
            return self._ask_once(spec, body, row=row)
        except ReplyInvalid as error:
            if is_refusal_kept:
                kept = Refusal(reason=str(error), at=time.time())
                self.store.put_bytes(refusal_key, kept.model_dump_json().encode())
            raise

    def _check_refusal(self, key: str) -> None:
        """Raise what this profile's reply was found to be lately, without asking again."""
        data = self.store.find_bytes(key)
        if data is not None:
            refusal = Refusal.model_validate_json(data)
            if time.time() - refusal.at < REFUSAL_DAYS * 86_400:
                raise ReplyInvalid(refusal.reason)

    def _ask_once(self, spec: RequestSpec[T], body: dict[str, Any], *, row: LedgerRow) -> Answer[T]:
        started = time.monotonic()
        raw = self.send(body, row=row)
        return self.accept(spec, raw, row=replace(row, seconds=time.monotonic() - started))

    def send(
        self,
        body: dict[str, Any],
        *,
        row: LedgerRow,
        on_text: Callable[[str], None] | None = None,
        create: Callable[..., dict[str, Any]] = complete,
    ) -> dict[str, Any]:
        """Send a body within pace and budget and return the completion; failures are booked, not replies.

        Args:
            on_text: takes the reply as it streams; what was shown once is not asked for again by itself.
            create: makes the call; takes client, body and `timeout_seconds`.

        """
        profile = self.config.profiles[row.profile]
        tokens_in, tokens_out = count_body_tokens(body, profile)
        most = Usage(input_tokens=tokens_in, output_tokens=tokens_out)
        worst = compute_cost(profile.prices, most, is_batch=False)[0] or 0.0
        if profile.pictures == "presigned":
            body = publish_pictures(body, self.store, seconds=CALL_SECONDS)
        reservation = self.budget.reserve(worst)

        def fail(error: LikenessError) -> None:
            self.ledger.book(replace(row, outcome=type(error).__name__))

        def attempt(timeout: float) -> dict[str, Any]:
            client = self.client(row.profile)
            if on_text is None:
                return create(client, body, timeout_seconds=timeout)
            return complete_streaming(client, body, timeout_seconds=timeout, on_text=on_text)

        if on_text is not None:
            profile = profile.model_copy(update={"max_attempts": 1})
        # Before the call's own time begins; tries after the first go by the provider's answers.
        self.pace(row.profile).wait(tokens_in)
        try:
            raw: dict[str, Any] = call_with_retries(attempt, profile, on_failure=fail)
        except KeyboardInterrupt:  # what was generated until then may be billed: it stays reserved
            guess = compute_cost(profile.prices, Usage(input_tokens=tokens_in), is_batch=False)[0]
            self.ledger.book(replace(row, outcome="cancelled", usage=Usage(input_tokens=tokens_in), cost_usd=guess))
            raise
        except LikenessError as error:
            if is_surely_unpaid(error):
                self.budget.settle(reservation, reserved=worst, spent=0.0)
            raise
        cost, _ = self.price(row.profile, raw, is_batch=False)
        self.budget.settle(reservation, reserved=worst, spent=worst if cost is None else cost)
        return raw

    def accept(self, spec: RequestSpec[T], completion: dict[str, Any], *, row: LedgerRow) -> Answer[T]:
        """Book a completion, validate it, and keep it. Raises ReplyInvalid."""
        cost, price_date = self.price(row.profile, completion, is_batch=row.is_batch)
        served = str(completion.get("model") or "")
        row = replace(
            row, served_model=served, usage=read_usage(completion), cost_usd=cost, price_date=price_date,
            seconds=round(row.seconds, 3),
        )  # fmt: skip
        choices = completion.get("choices") or [{}]
        message = choices[0].get("message") or {}
        content = read_content(message, self.structure(row.profile))
        try:
            parsed = parse_reply(
                spec.reply, content, finish_reason=choices[0].get("finish_reason"), refusal=message.get("refusal")
            )
        except ReplyInvalid:
            self.ledger.book(replace(row, outcome="invalid"))
            raise
        trace = read_trace(message)
        # Stored before it is booked: a run that ends in between must not pay for it again.
        kept = CachedReply(content=content or "", served_model=served, trace=trace)
        self.store.put_bytes(self.cache_key(spec, row.profile), kept.model_dump_json().encode())
        self.ledger.book(replace(row, outcome="ok"))
        return Answer(parsed, row.profile, served, row.rung, row.reason, trace)

    def find_cached(self, spec: RequestSpec[T], *, name: str, role: str) -> Answer[T] | None:
        """Return a kept reply, and book that nothing was paid."""
        found = self.read_kept(spec, name=name)
        if found is not None:
            model = self.config.profiles[name].model
            self.ledger.book(LedgerRow(role, name, model, outcome="cached", served_model=found.served_model))
        return found

    def read_kept(self, spec: RequestSpec[T], *, name: str) -> Answer[T] | None:
        """Return a validated reply in the store."""
        data = self.store.find_bytes(self.cache_key(spec, name))
        if data is None:
            return None
        try:
            cached = CachedReply.model_validate_json(data)
            parsed = parse_reply(spec.reply, cached.content, finish_reason="stop", refusal=None)
        except (ValidationError, ReplyInvalid):
            return None
        return Answer(parsed, name, cached.served_model, trace=cached.trace)

    def cache_key(self, spec: RequestSpec[Any], name: str) -> str:
        """Return where a profile's reply to a request is kept."""
        return f"llm/replies/{spec.compute_key(self.config.profiles[name])}.json"

    def price(self, name: str, completion: dict[str, Any], *, is_batch: bool) -> tuple[float | None, str]:
        """Return what a completion cost, at the prices of the model that served it."""
        profile, served = self.config.profiles[name], str(completion.get("model") or "")
        prices = profile.prices
        if served and not profile.is_served(served):
            if (name, served) not in self.substitutes:
                self.substitutes.add((name, served))
                log.warning("%s was asked for and %s answered: its grades don't compare", profile.model, served)
            others = [other.prices for other in self.config.profiles.values() if other.is_served(served)]
            prices = others[0] if others else (prices if profile.base_url is None else None)
        return compute_cost(prices, read_usage(completion), is_batch=is_batch)

    def is_comparable(self, answer: Answer[Any]) -> bool:
        """Whether the model that was asked for has answered."""
        return self.config.profiles[answer.profile].is_served(answer.served_model)

    def call(self, body: dict[str, Any], *, row: LedgerRow) -> dict[str, Any]:
        """Send a body and book the completion: for what isn't the reply to a request, such as a probe."""
        completion = self.send(body, row=row)
        self.book_completion(completion, row=row)
        return completion

    def book_completion(self, completion: dict[str, Any], *, row: LedgerRow) -> None:
        """Write down a completion that is no reply to be validated and kept."""
        cost, date = self.price(row.profile, completion, is_batch=False)
        served, usage = str(completion.get("model") or ""), read_usage(completion)
        self.ledger.book(replace(row, outcome="ok", served_model=served, usage=usage, cost_usd=cost, price_date=date))
