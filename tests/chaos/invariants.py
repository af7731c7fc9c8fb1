"""What must hold when all faults have ended, checked on evidence that was collected before."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

IN_FLIGHT_SECONDS = 3.0
"""Before a fault: a reply that was delivered so shortly before it may not have been stored."""


@dataclass(frozen=True)
class RunOutcome:
    """How one run ended."""

    name: str
    state: str
    """The flow run's, by type: COMPLETED, FAILED, ..."""
    resume_codes: tuple[int, ...]
    """Exit codes of `likeness resume`; none where it was not needed."""
    weights: Mapping[str, str]
    """SHA-256 of the bytes of each weights file in the store; none where there is no finished run."""
    expected: Mapping[str, str]
    """Those of the undisturbed run with the same settings."""
    finished: tuple[tuple[float, float], ...] = ()
    """Begin and end of each attempt that finished, Unix time in seconds."""


@dataclass(frozen=True)
class Answer:
    """A question that an LLM server answered, and whose answer was delivered."""

    sha256: str
    at: float


@dataclass(frozen=True)
class Account:
    """What an LLM was asked for the runs of one store, beside the same runs undisturbed."""

    name: str
    answers: tuple[Answer, ...]
    expected: Mapping[str, int]
    """How often each question is asked without faults: repeats by design count."""
    paid: Mapping[str, int]
    """Ledger rows of paid calls by role, over all attempts."""
    expected_paid: Mapping[str, int]


@dataclass(frozen=True)
class Evidence:
    """What a campaign left."""

    runs: tuple[RunOutcome, ...]
    accounts: tuple[Account, ...]
    fault_times: tuple[float, ...]
    active_slots: Mapping[str, int]
    """By concurrency limit."""
    pool_accepts_runs: bool
    """Whether the work pool took another run after all others had ended."""
    orphans: tuple[str, ...]
    """Command lines of processes that outlived the stack."""
    temporary_files: tuple[str, ...]
    """After the next start."""


def check(evidence: Evidence) -> list[str]:
    """Return every violation as a sentence; none where all invariants hold."""
    return [
        *check_ends(evidence.runs),
        *check_weights(evidence.runs),
        *check_doubles(evidence.runs),
        *(text for account in evidence.accounts for text in check_account(account, evidence.fault_times)),
        *check_slots(evidence),
        *(f"a process outlived the stack: {command}" for command in evidence.orphans),
        *(f"a temporary file was left after the next start: {path}" for path in evidence.temporary_files),
    ]


def check_ends(runs: Sequence[RunOutcome]) -> Iterator[str]:
    """Every run completes, by itself or by `likeness resume`, and none is left in progress."""
    for run in runs:
        if run.state in ("RUNNING", "PENDING", "CANCELLING"):
            yield f"run {run.name} was left in state {run.state}"
        if run.state != "COMPLETED" and (not run.resume_codes or run.resume_codes[-1] != 0):
            yield f"run {run.name} ended {run.state} and was not resumed (exit codes {list(run.resume_codes)})"


def check_weights(runs: Sequence[RunOutcome]) -> Iterator[str]:
    """The weights are those of the undisturbed run, bit for bit."""
    for run in runs:
        if not run.expected:
            yield f"run {run.name} has no undisturbed run to be compared with"
        elif not run.weights:
            yield f"run {run.name} left no weights"
        elif dict(run.weights) != dict(run.expected):
            changed = [name for name in run.expected if run.weights.get(name) != run.expected[name]]
            names = ", ".join(changed) or "more files"
            yield f"the weights of run {run.name} differ from those of the undisturbed run: {names}"


def check_doubles(runs: Sequence[RunOutcome]) -> Iterator[str]:
    """No run is executed twice at once. Twice in turn is none: a process may die between its result and its state."""
    for run in runs:
        spans = sorted(run.finished)
        if any(later[0] < earlier[1] for earlier, later in pairwise(spans)):
            yield f"run {run.name} was executed twice at once"


def check_account(account: Account, fault_times: Sequence[float]) -> Iterator[str]:
    """No question is paid more often than without faults, unless a fault may have cut its answer off."""
    for role, count in account.paid.items():
        needed = account.expected_paid.get(role, 0)
        if count > needed:
            yield f"{account.name}: the ledgers hold {count} paid calls of the {role}, {needed} are needed"
    for sha256 in find_repeats(account, fault_times):
        yield f"{account.name}: question {sha256[:12]} was answered more often than without faults"


def find_repeats(account: Account, fault_times: Sequence[float]) -> list[str]:
    """Return the questions that were answered too often."""
    counts = Counter(answer.sha256 for answer in account.answers if not is_in_flight(answer, fault_times))
    return [sha256 for sha256, count in counts.items() if count > account.expected.get(sha256, 0)]


def is_in_flight(answer: Answer, fault_times: Sequence[float]) -> bool:
    """Whether a fault followed so shortly that the answer may not have been stored."""
    return any(0 <= at - answer.at <= IN_FLIGHT_SECONDS for at in fault_times)


def check_slots(evidence: Evidence) -> Iterator[str]:
    """No slot is held when nothing runs."""
    if not evidence.active_slots:
        yield "the server has no concurrency limit, so that none could leak"
    for name, slots in evidence.active_slots.items():
        if slots:
            yield f"concurrency limit {name} still has {slots} slots in use"
    if not evidence.pool_accepts_runs:
        yield "the work pool took no run after all others had ended"
