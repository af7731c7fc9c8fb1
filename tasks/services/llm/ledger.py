"""What was asked of providers and what it cost: one line per attempt, appended."""

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.services.llm.config import ProfileConfig


@dataclass(frozen=True)
class LedgerRow:
    """One attempt."""

    role: str
    asked_model: str
    served_model: str
    outcome: str
    """ok, cached, invalid, or the error's name."""
    input_tokens: int
    output_tokens: int
    is_batch: bool
    cost_usd: float | None
    """None where no price is known."""
    seconds: float
    at: float


class Ledger:
    """Appends rows to a file and keeps this process's totals."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[LedgerRow] = []
        self.lock = threading.Lock()

    def book(
        self,
        profile: ProfileConfig,
        *,
        role: str,
        outcome: str,
        served_model: str = "",
        tokens: tuple[int, int] = (0, 0),
        is_batch: bool = False,
        seconds: float = 0.0,
    ) -> None:
        """Write down one attempt."""
        row = LedgerRow(
            role=role,
            asked_model=profile.model,
            served_model=served_model,
            outcome=outcome,
            input_tokens=tokens[0],
            output_tokens=tokens[1],
            is_batch=is_batch,
            cost_usd=compute_cost(profile, tokens, is_batch=is_batch),
            seconds=round(seconds, 3),
            at=round(time.time(), 3),
        )
        line = json.dumps(asdict(row)) + "\n"
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


def compute_cost(profile: ProfileConfig, tokens: tuple[int, int], *, is_batch: bool) -> float | None:
    """Return USD for input and output tokens; None where the profile has no prices."""
    if profile.prices is None:
        return None if sum(tokens) else 0.0
    share = 1 - profile.prices.batch_discount if is_batch else 1.0
    return share * (tokens[0] * profile.prices.input + tokens[1] * profile.prices.output) / 1e6
