"""The image's health check: what LIKENESS_HEALTH_URL names is alive; without it, the project can be imported.

An `http:` address has to answer, the file of a `file:` address has to be younger than two minutes.
"""

import os
import sys
import time
import urllib.request
from importlib.util import find_spec

MAX_AGE_SECONDS = 120.0


def main() -> int:
    """Return 0 where the container is healthy."""
    url = os.environ.get("LIKENESS_HEALTH_URL")
    if not url:
        return 0 if find_spec("flows") else 1
    try:
        if url.startswith("file:"):
            age = time.time() - os.stat(url.removeprefix("file://")).st_mtime
            return 0 if age <= MAX_AGE_SECONDS else 1
        with urllib.request.urlopen(url, timeout=8):  # noqa: S310 - set by whoever runs the container
            return 0
    except OSError as error:
        print(f"{url}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
