"""Open the configured object store."""

import random
import time
from pathlib import Path

from tasks.errors import ServiceUnavailable
from tasks.services.config import StoreConfig
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tasks.services.store.s3 import S3Store

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 20.0


def open_store(config: StoreConfig) -> Store:
    """Return the configured store. Raises ConfigError if it cannot be written."""
    if config.kind == "local":
        return LocalStore(Path(config.folder))
    return S3Store(config)


def open_store_within(config: StoreConfig, *, seconds: float) -> Store:
    """Return the configured store; while it doesn't answer, try again with growing pauses and jitter.

    Raises:
        ConfigError: it cannot be used, which no second attempt changes.
        ServiceUnavailable: it did not answer within `seconds`.

    """
    deadline, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
    while True:
        try:
            return open_store(config)
        except ServiceUnavailable:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
