"""The exception tree, sorted by what the operator should do.

    LikenessError
    |-- ConfigError           fix the configuration
    |-- SubjectRejected       fix the photos
    |-- ServiceUnavailable    wait; retried by the steps that talk to services
    |   `-- StillPending      a batch job runs on; run again later
    |       `-- ApprovalPending   decide: `likeness approve`
    |-- LeaseLost             nothing: another process continues the same work
    |-- ReplyInvalid          retried within a small bound
    |-- ArtifactCorrupt       rebuild: the stored object is not what its manifest says
    |-- StorageFull           free disk space
    |-- TrainingFailed        see the log it names
    |   |-- TrainingStopped   run again: it resumes from its checkpoint
    |   `-- AdapterSaveFailed choose other training.lora.target_modules: the saved LoRA file doesn't load back
    `-- BudgetExceeded        raise the cap

A message is one line: what, where, what next.
"""

from tasks.redaction import clean_text, redact, shorten

MESSAGE_LIMIT = 2_000


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text; its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class LikenessError(Exception):
    """Base of every error that a person can act on.

    Messages are redacted and freed of control characters here, once for all of them: they quote
    servers, files and settings, and end in terminals, logs, `summary.json` and Prefect's database.
    """

    exit_code = 1
    is_retryable = False

    def __init__(self, message: str = "") -> None:
        # Cut before redaction, whose patterns take time per character, and again after it, since masks change lengths.
        cleaned = clean_text(redact(shorten(message, limit=4 * MESSAGE_LIMIT)))
        # `splitlines` knows all of Unicode's line ends: quoted text must not look like a log line of its own.
        super().__init__(shorten(" ".join(line.strip() for line in cleaned.strip().splitlines()), limit=MESSAGE_LIMIT))

    @property
    def kind(self) -> str:
        """The name of the nearest class of this module: subclasses defined by services count as their base."""
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__ == LikenessError.__module__)


class ConfigError(LikenessError):
    """The configuration is wrong or incomplete."""

    exit_code = 2


class SubjectRejected(LikenessError):
    """The photos are unsuitable."""

    exit_code = 3


class ServiceUnavailable(LikenessError):
    """A service is unavailable."""

    exit_code = 4
    is_retryable = True


class StillPending(ServiceUnavailable):
    """A remote job is not finished; asking again at once would not help."""

    is_retryable = False


class ApprovalPending(StillPending):
    """The photos wait for a person's approval."""


class LeaseLost(LikenessError):
    """Another process took over a lease, for example while this one was suspended; it must not write any more."""


class ReplyInvalid(LikenessError):
    """A service's reply does not fit the request."""

    exit_code = 5
    is_retryable = True


class ArtifactCorrupt(LikenessError):
    """A stored object differs from what its manifest says."""

    exit_code = 6


class StorageFull(LikenessError):
    """There is no disk space for a write."""

    exit_code = 10


class TrainingFailed(LikenessError):
    """The training worker ended without a result."""

    exit_code = 7


class TrainingStopped(TrainingFailed):
    """The training worker was asked to stop and saved its state."""

    exit_code = 8


class AdapterSaveFailed(TrainingFailed):
    """A saved LoRA file does not load back as the adapter that was trained."""


class BudgetExceeded(LikenessError):
    """A cap on money or calls is reached."""

    exit_code = 9
