"""The request of `likeness run`: from its arguments, or from a `request.json`."""

from collections.abc import Iterable
from pathlib import Path

from conf.overrides import override_request, parse_overrides
from flows.runs.records import REQUEST, StoredRequest, read_request_file, relocate
from tasks.errors import ArtifactCorrupt, ConfigError

MAX_BYTES = 1_000_000


def load_request(words: Iterable[str], file: Path | None = None) -> StoredRequest:
    """Return the request of the arguments, or that of a file (or run folder) with the arguments applied to it.

    A request that came through a deployment keeps its restrictions: repeating it does not lift them.

    Raises:
        ConfigError: the file is missing, damaged or not a request, or an argument is invalid.

    """
    if file is None:
        return StoredRequest(request=parse_overrides(words), is_trusted=True)
    path = file / REQUEST if file.is_dir() else file
    if path.exists() and not (path.is_file() and path.stat().st_size <= MAX_BYTES):  # a device or a pipe never ends
        raise ConfigError(f"{path} is not a file of at most {MAX_BYTES:,} bytes; --request takes a run's {REQUEST}")
    try:
        stored = read_request_file(path, hint=f"--request takes the {REQUEST} of a run's folder")
    except ArtifactCorrupt as error:
        raise ConfigError(str(error)) from error
    is_run_folder = (path.parent / "config.json").is_file()
    request = relocate(stored.request, path.parent.absolute()) if is_run_folder else stored.request
    return StoredRequest(request=override_request(request, words), is_trusted=stored.is_trusted)
