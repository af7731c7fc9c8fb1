"""Open the configured object store."""

from pathlib import Path

from tasks.services.config import StoreConfig
from tasks.services.store.base import Store
from tasks.services.store.local import LocalStore
from tasks.services.store.s3 import S3Store


def open_store(config: StoreConfig) -> Store:
    """Return the configured store. Raises ConfigError if it cannot be written."""
    if config.kind == "local":
        return LocalStore(Path(config.folder))
    return S3Store(config)
