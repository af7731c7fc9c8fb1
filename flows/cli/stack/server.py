"""The Prefect server that is configured: whether it answers, and with a version that this client understands."""

from tasks.errors import ConfigError, ServiceUnavailable
from tasks.redaction import clean_text, redact

TIMEOUT_SECONDS = 20.0


def check_server() -> None:
    """Check the configured server before anything is sent to it.

    Raises:
        ConfigError: it is none of Prefect's, has another major version, or refuses the credentials.
        ServiceUnavailable: it does not answer.

    """
    import httpx
    from packaging.version import InvalidVersion, Version
    from prefect.client.base import ServerType
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    # By its defaults the client would wait for minutes.
    quick = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 2, PREFECT_API_REQUEST_TIMEOUT: TIMEOUT_SECONDS})
    with quick, get_client(sync_client=True) as client:
        if client.server_type == ServerType.CLOUD:  # of every version
            return
        server = f"the Prefect server at {clean_text(redact(str(client.api_url).rstrip('/')))}"
        own = Version(client.client_version())
        try:
            found = Version(str(client.api_version()))
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise ConfigError(f"{server} refuses the credentials; set PREFECT_API_AUTH_STRING") from error
            if status < 500:
                raise ConfigError(f"{server} is none: it answers {status}; its address ends with /api") from error
            raise ServiceUnavailable(f"{server} answers {status}") from error
        except (httpx.HTTPError, OSError) as error:
            raise ServiceUnavailable(
                f"{server} does not answer ({type(error).__name__}); start it, or unset PREFECT_API_URL"
            ) from error
        except (InvalidVersion, ValueError) as error:
            raise ConfigError(f"{server} is none: its answer is no version; its address ends with /api") from error
        if found.major != own.major:
            raise ConfigError(f"{server} has version {found}, this is {own}: their first numbers must be equal")
