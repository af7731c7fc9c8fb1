"""What was asked of providers and what it cost: one line per attempt, appended; and the cap on it."""

import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tasks.errors import BudgetExceeded
from tasks.services.llm.config import PriceConfig

XAI_TICKS_PER_USD = 1e10


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply; cached and image ones are among the input, reasoning among the output."""

    input_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    reported_usd: float | None = None
    """What the provider says it costs, where it does."""


def read_usage(completion: dict[str, Any]) -> Usage:
    """Return the usage that a completion reports, in any provider's words."""
    usage = completion.get("usage") or {}
    inputs, outputs = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    reported = usage.get("cost")
    if usage.get("cost_in_usd_ticks") is not None:
        reported = float(usage["cost_in_usd_ticks"]) / XAI_TICKS_PER_USD
    return Usage(
        input_tokens=int(usage.get("prompt_tokens") or 0),
        cached_tokens=int(inputs.get("cached_tokens") or 0),
        image_tokens=int(inputs.get("image_tokens") or 0),
        output_tokens=int(usage.get("completion_tokens") or 0),
        reasoning_tokens=int(outputs.get("reasoning_tokens") or 0),
        reported_usd=None if reported is None else float(reported),
    )


@dataclass(frozen=True)
class LedgerRow:
    """One attempt."""

    role: str
    profile: str
    asked_model: str
    outcome: str
    """ok, cached, invalid, or the error's name."""
    served_model: str = ""
    usage: Usage = field(default_factory=Usage)
    is_batch: bool = False
    cost_usd: float | None = 0.0
    """None where no price is known."""
    price_date: str = ""
    """Day of the price table, or `reported` for the provider's own figure."""
    rung: int = 0
    """0 for the role's first profile, 1 for the second, ..."""
    reason: str = ""
    """Why it was not asked of the one before."""
    seconds: float = 0.0
    at: float = 0.0


class Ledger:
    """Appends rows to a file and keeps this process's totals."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[LedgerRow] = []
        self.lock = threading.Lock()

    def book(self, row: LedgerRow) -> None:
        """Write down one attempt."""
        line = json.dumps({**asdict(row), "at": round(time.time(), 3)}) + "\n"
        with self.lock:
            self.rows.append(row)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())

    def count_calls(self, *, since: int = 0) -> int:
        """Return how many attempts reached a provider."""
        return sum(row.outcome != "cached" for row in self.rows[since:])

    def sum_cost(self, *, since: int = 0) -> float | None:
        """Return the money spent; None if any price is unknown."""
        costs = [row.cost_usd for row in self.rows[since:] if row.outcome != "cached"]
        return None if any(cost is None for cost in costs) else sum(c for c in costs if c is not None)


def compute_cost(prices: PriceConfig | None, usage: Usage, *, is_batch: bool) -> tuple[float | None, str]:
    """Return USD and where the figure is from; None where neither provider nor profile says."""
    if usage.reported_usd is not None:
        return usage.reported_usd, "reported"
    if prices is None:
        return (None if usage.input_tokens + usage.output_tokens else 0.0), ""
    share = 1 - prices.batch_discount if is_batch else 1.0
    cached_price = prices.input if prices.cached_input is None else prices.cached_input
    fresh = usage.input_tokens - usage.cached_tokens
    total = fresh * prices.input + usage.cached_tokens * cached_price + usage.output_tokens * prices.output
    return share * total / 1e6, prices.date


class Budget:
    """A cap that holds over all processes and restarts: the worst case is reserved before anything is sent.

    What a process reserved and never settled, because it was killed, counts as spent: it may have been.
    """

    def __init__(self, path: Path | None = None, cap_usd: float | None = None) -> None:
        self.path = path
        self.cap_usd = cap_usd

    def reserve(self, usd: float) -> str:
        """Set money aside and return the reservation's name.

        Raises:
            BudgetExceeded: it would pass the cap.

        """
        name = uuid.uuid4().hex
        if self.cap_usd is None:
            return name
        with self._locked() as file:
            spent = sum(json.loads(line)["usd"] for line in file)
            if spent + usd > self.cap_usd + 1e-12:
                raise BudgetExceeded(
                    f"{spent:.4f} of {self.cap_usd:.4f} USD are spent or set aside and the next call may cost "
                    f"{usd:.4f}; what was answered is kept: raise llm.budget_usd and run again"
                )
            self._append(file, {"name": name, "usd": usd})
        return name

    def settle(self, name: str, *, reserved: float, spent: float) -> None:
        """Give back what a reservation didn't need."""
        if self.cap_usd is not None:
            with self._locked() as file:
                self._append(file, {"name": name, "usd": spent - reserved})

    @contextmanager
    def _locked(self) -> Iterator[TextIO]:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file

    @staticmethod
    def _append(file: TextIO, row: dict[str, Any]) -> None:
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
