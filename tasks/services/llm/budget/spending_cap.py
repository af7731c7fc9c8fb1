"""A cap on money that holds over all processes and restarts."""

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, Field

from tasks.errors import ArtifactCorrupt, BudgetExceeded
from tasks.stage.digests import dump_signed, load_signed
from tasks.stage.files import write_atomic


class BudgetState(BaseModel):
    """What is spent, and what is reserved by name."""

    spent_usd: float = Field(0.0, ge=0, allow_inf_nan=False)
    reserved: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Spent and reserved money."""
        return self.spent_usd + sum(self.reserved.values())


class Budget:
    """Worst-case cost is reserved before each attempt, then reconciled.

    Money is counted without a cap too, so that one that is set later knows what was spent before.
    What a process reserved and never settled, because it was killed, counts as spent: it may have been.
    A damaged file frees no money: nothing is reserved until a person has looked at it.
    """

    def __init__(self, path: Path | None = None, cap_usd: float | None = None) -> None:
        self.path = path
        self.cap_usd = cap_usd

    def reserve(self, usd: float) -> str:
        """Reserve money and return the reservation's name.

        Raises:
            BudgetExceeded: it would pass the cap, or the file is damaged.

        """
        name = uuid.uuid4().hex
        if self.path is None or (self.cap_usd is None and usd <= 0):
            return name  # nothing to count: most calls go to local models
        with self._locked() as state:
            if self.cap_usd is not None and state.total + usd > self.cap_usd + 1e-12:
                raise BudgetExceeded(
                    f"{state.total:.4f} of {self.cap_usd:.4f} USD are spent or reserved and the next call may cost "
                    f"{usd:.4f}; what was answered is kept: raise llm.budget_usd and run again"
                )
            state.reserved[name] = usd
        return name

    def settle(self, name: str, *, spent: float) -> None:
        """Replace a reservation by what was spent; one that is settled already stays as it is."""
        if self.path is not None and self.path.exists():
            with self._locked() as state:
                if state.reserved.pop(name, None) is not None:
                    state.spent_usd += max(0.0, spent)

    @contextmanager
    def _locked(self) -> Iterator[BudgetState]:
        """Yield the state to be changed, and write it at the end."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self._read()
            yield state or BudgetState()
            if state is not None:
                write_atomic(self.path, dump_signed(state))

    def _read(self) -> BudgetState | None:
        """Return the state; None for a damaged file where there is no cap, which stays for the one that sets it."""
        assert self.path is not None
        try:
            return load_signed(BudgetState, self.path.read_bytes())
        except FileNotFoundError:
            return BudgetState()
        except ArtifactCorrupt as error:
            if self.cap_usd is None:
                return None
            raise BudgetExceeded(
                f"the budget file {self.path} is damaged ({error}), so what is spent is unknown; compare `likeness "
                "cost` with the provider's bill, lower llm.budget_usd by it, delete the file and run again"
            ) from error
