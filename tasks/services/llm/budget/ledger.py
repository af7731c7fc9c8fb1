"""The ledger of provider calls and their cost: an append-only file, one signed line per attempt."""

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tasks.redaction import clean_text, redact, shorten
from tasks.services.llm.budget.journal import append_line
from tasks.services.llm.chat.completion import Usage
from tasks.services.llm.config import PriceConfig
from tasks.stage.digests import dump_line, load_lines

MAX_CHARACTERS = 500


@dataclass(frozen=True)
class LedgerRow:
    """One attempt."""

    role: str
    profile: str
    requested_model: str
    outcome: str
    """ok, cached, invalid, cancelled, or the error's name."""
    served_model: str = ""
    usage: Usage = field(default_factory=Usage)
    usage_fault: str = ""
    """Why usage and cost are the reservation's rather than the provider's; empty where they are the provider's."""
    response_format: str = ""
    """In which the reply was requested; empty where no usable reply came."""
    is_batch: bool = False
    cost_usd: float | None = 0.0
    """None where no price is known."""
    price_date: str = ""
    """Day of the price table, or `reported` for the provider's own figure."""
    fallback_index: int = 0
    """0 for the role's first profile, 1 for the second, ..."""
    reason: str = ""
    """Why the previous profile's reply was not used."""
    seconds: float = 0.0
    at: float = 0.0


class Ledger:
    """Appends rows to a file and holds this process's rows for its totals."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[LedgerRow] = []
        self.lock = threading.Lock()

    def record(self, row: LedgerRow) -> None:
        """Append one attempt to the file and to this process's rows."""
        # These three quote servers, so they may hold secrets, control characters or megabytes.
        row = replace(
            row,
            reason=show(row.reason),
            usage_fault=show(row.usage_fault),
            served_model=show(row.served_model),
        )
        line = dump_line({**asdict(row), "at": round(time.time(), 3)}).encode()
        # `append_line` looks at the end of the file, so appends must not interleave.
        with self.lock:
            self.rows.append(row)
            append_line(self.path, line)

    def count_calls(self, *, since: int = 0) -> int:
        """Return the number of attempts, cache hits apart; `since` is an index into this process's rows."""
        return sum(row.outcome != "cached" for row in self.rows[since:])

    def sum_cost(self, *, since: int = 0) -> float | None:
        """Return the cost in USD since a row index; None if any price is unknown."""
        costs = [row.cost_usd for row in self.rows[since:] if row.outcome != "cached"]
        return None if any(cost is None for cost in costs) else sum(c for c in costs if c is not None)


def show(text: str) -> str:
    """Return a text redacted, cleaned and shortened to MAX_CHARACTERS."""
    return shorten(clean_text(redact(text)), limit=MAX_CHARACTERS)


def read_rows(path: Path) -> Iterator[LedgerRow | None]:
    """Yield a ledger's rows, None for each line that is torn, fails verification or is no row."""
    rows = TypeAdapter(LedgerRow)
    for line in load_lines(path.read_bytes()):
        try:
            yield None if line is None else rows.validate_python(line)
        except ValidationError:
            yield None


def compute_cost(prices: PriceConfig | None, usage: Usage, *, is_batch: bool) -> tuple[float | None, str]:
    """Return the cost in USD and its source: `reported`, or the price table's date; None where no price is known."""
    if usage.reported_usd is not None:
        return usage.reported_usd, "reported"
    if prices is None:  # nothing was used: the cost is 0 at any price
        return (None if usage.input_tokens + usage.output_tokens else 0.0), ""
    share = 1 - prices.batch_discount if is_batch else 1.0
    cached_price = prices.input if prices.cached_input is None else prices.cached_input
    fresh = usage.input_tokens - usage.cached_tokens
    total = fresh * prices.input + usage.cached_tokens * cached_price + usage.output_tokens * prices.output
    return share * total / 1e6, prices.date  # prices are per million tokens
