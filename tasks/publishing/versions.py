"""The versions that a report names."""

import contextlib
import platform
from importlib import metadata

VERSIONED = ("likeness", "torch", "diffusers", "transformers", "pytorch-lightning", "prefect")
"""Packages whose versions a report names."""


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that made the model, and the machine's kind."""
    found = {"Python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):  # likeness itself, run from a checkout
            found[name] = metadata.version(name)
    return {**found, "on": f"{platform.system()} {platform.machine()}"}
