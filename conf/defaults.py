"""The default of every setting, as `conf/run.yaml` gives it before any group option."""

from collections.abc import Iterator
from functools import cache

import yaml

from conf.groups import CONFIG_DIR


@cache
def read_defaults() -> dict[str, object]:
    """Return the defaults as nested mappings, without mandatory settings (???)."""
    values = drop_missing(yaml.safe_load((CONFIG_DIR / "run.yaml").read_text()))
    del values["defaults"]  # Hydra's defaults list, not a setting
    return values


def list_settings() -> list[str]:
    """Return the dotted names of all settings in `run.yaml`, for shell completion."""
    values = yaml.safe_load((CONFIG_DIR / "run.yaml").read_text())
    del values["defaults"]
    return list(walk_names(values))


def walk_names(values: dict[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the leaves of nested values."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from walk_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def drop_missing(values: dict[str, object]) -> dict[str, object]:
    """Return nested values without those that are ???."""
    return {
        name: drop_missing(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != "???"
    }


def overlay_values(values: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    """Return values with changes merged in, key by key where both are mappings."""
    merged = dict(values)
    for name, change in changes.items():
        old = merged.get(name)
        merged[name] = overlay_values(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return merged


def fill_defaults(stored: object) -> object:
    """Return a stored configuration completed with the settings that later versions added."""
    return overlay_values(read_defaults(), stored) if isinstance(stored, dict) else stored
