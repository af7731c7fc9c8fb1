"""A spending cap that holds across processes and restarts."""

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
    """USD spent, and USD reserved by reservation."""

    spent_usd: float = Field(0.0, ge=0, allow_inf_nan=False)
    reserved: dict[str, float] = {}

    @property
    def total(self) -> float:
        """USD spent and reserved."""
        return self.spent_usd + sum(self.reserved.values())


class Budget:
    """Worst-case cost is reserved before each attempt, then reconciled.

    Spending is counted without a cap too, so that a cap set later includes it. A reservation that is never reconciled,
    because its process was killed, keeps counting as spent: the call may have been billed. With a cap, a damaged
    file blocks all reservations until the operator has resolved it.
    """

    def __init__(self, path: Path | None = None, cap_usd: float | None = None) -> None:
        self.path = path
        self.cap_usd = cap_usd

    def reserve(self, usd: float) -> str:
        """Reserve an amount in USD and return the reservation's name.

        Raises:
            BudgetExceeded: it would pass the cap, or the file is damaged.

        """
        name = uuid.uuid4().hex
        if self.path is None or (self.cap_usd is None and usd <= 0):
            return name  # nothing to count: most calls go to local models
        with self._locked() as state:
            # The tolerance absorbs rounding of summed floats where a cap is used up exactly.
            if self.cap_usd is not None and state.total + usd > self.cap_usd + 1e-12:
                raise BudgetExceeded(
                    f"{state.total:.4f} of {self.cap_usd:.4f} USD are spent or reserved and the next call may cost "
                    f"{usd:.4f}; replies are cached: raise llm.budget_usd and run again"
                )
            state.reserved[name] = usd
        return name

    def reconcile(self, name: str, *, spent: float) -> None:
        """Replace a reservation by the actual cost. Idempotent: an unknown or reconciled name changes nothing."""
        if self.path is not None and self.path.exists():
            with self._locked() as state:
                if state.reserved.pop(name, None) is not None:
                    state.spent_usd += max(0.0, spent)

    @contextmanager
    def _locked(self) -> Iterator[BudgetState]:
        """Yield the state under an exclusive lock, and write it back unless the block raises."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A lock file of its own: `write_atomic` replaces the state's inode, and a lock on the old one excludes nobody.
        with self.path.with_suffix(".lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self._read()
            # A damaged file without a cap: changes go to a throw-away state, and the file stays as it is.
            yield state or BudgetState()
            if state is not None:
                write_atomic(self.path, dump_signed(state))

    def _read(self) -> BudgetState | None:
        """Return the state; None for a damaged file without a cap, which is left in place for a later cap to find."""
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
