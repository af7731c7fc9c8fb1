"""The default of every setting, as `conf/run.yaml` gives it before any group option."""

from functools import cache
from typing import Any

import yaml

from conf.groups import FOLDER


@cache
def read_defaults() -> dict[str, Any]:
    """Return the defaults as nested mappings, without the settings that a run has to name (???)."""
    values = drop_missing(yaml.safe_load((FOLDER / "run.yaml").read_text()))
    del values["defaults"]
    return values


def drop_missing(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values without those that are ???."""
    return {
        name: drop_missing(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != "???"
    }


def overlay_values(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return values with changes put in, key by key where both are mappings."""
    merged = dict(values)
    for name, change in changes.items():
        old = merged.get(name)
        merged[name] = overlay_values(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return merged


def fill_defaults(stored: Any) -> Any:
    """Return a stored configuration completed with the settings that later versions added."""
    return overlay_values(read_defaults(), stored) if isinstance(stored, dict) else stored
