"""The image's health check: the address in LIKENESS_HEALTH_URL answers; without one, the project can be imported."""

import os
import sys
import urllib.request
from importlib.util import find_spec


def main() -> int:
    """Return 0 where the container is healthy."""
    url = os.environ.get("LIKENESS_HEALTH_URL")
    if not url:
        return 0 if find_spec("flows") else 1
    try:
        with urllib.request.urlopen(url, timeout=8):  # noqa: S310 - set by whoever runs the container
            return 0
    except OSError as error:
        print(f"{url}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
