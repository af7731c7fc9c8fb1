"""Errors of LLM providers, with the data that callers decide by."""

from tasks.errors import BudgetExceeded, ConfigError, LikenessError, ServiceUnavailable


class RequestRefused(ConfigError):
    """The provider refused a request: key, model or body are wrong, and asking again would not help."""

    def __init__(self, message: str = "", *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class EndpointUnavailable(ServiceUnavailable):
    """The provider did not answer, or with nothing that can be read."""

    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        is_billable: bool = True,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, None where there was none."""
        self.is_billable = is_billable
        """Whether the provider may have generated, and bill, a reply that was never received."""
        self.retry_after = retry_after
        """Seconds to wait, where the provider names them."""


class QuotaExceeded(BudgetExceeded):
    """The balance or quota of the provider account is exhausted."""

    def __init__(self, message: str = "", *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def may_be_billed(error: LikenessError) -> bool:
    """Whether a failed attempt may cost money: all but those that were refused or never sent."""
    return isinstance(error, EndpointUnavailable) and error.is_billable
