"""Layers of tests by folder, and which tests stay together where several processes share them."""

from pathlib import Path, PurePosixPath

import pytest

TESTS = Path(__file__).resolve().parent.parent
LAYERS = {
    "architecture": "unit",
    "conf": "unit",
    "tasks": "unit",
    "tasks/diffusion": "stage",
    "tasks/encoders": "stage",
    "tasks/evaluation": "stage",
    "tasks/mini": "stage",
    "tasks/prior": "stage",
    "tasks/publishing": "stage",
    "tasks/scoring": "stage",
    "tasks/services/tracking": "stage",
    "tasks/subject": "stage",
    "tasks/training": "stage",
    "deployments": "stack",
    "faults": "flow",
    "flows": "flow",
    "servers": "servers",
    "browser": "browser",
}
"""The layer of each folder; the nearest one counts."""
SHARED = {"sandbox", "first_run"}
"""Fixtures of a session that take half a minute: tests that need them run in one process."""
LONGEST = ("tasks/training/process/", "faults/", "tasks/training/", "tasks/subject/photos/")
"""Begun right after the whole runs, so that no process is left alone with one of them at the end."""


def find_layer(path: Path) -> str:
    """Return the layer of a test file. Raises UsageError for a folder that nobody assigned."""
    relative = PurePosixPath(path.relative_to(TESTS).as_posix())
    for folder in relative.parents:
        if str(folder) in LAYERS:
            return LAYERS[str(folder)]
    raise pytest.UsageError(f"tests/{relative} is in no layer; add its folder to tests/support/layers.py")


def assign(items: list[pytest.Item]) -> None:
    """Mark tests with their layer and the group that stays together; order groups by length."""
    order: dict[pytest.Item, int] = {}
    for item in items:
        relative = item.path.relative_to(TESTS).as_posix()
        is_shared = bool(SHARED & set(getattr(item, "fixturenames", ())))
        item.add_marker(find_layer(item.path))
        item.add_marker(pytest.mark.xdist_group("whole runs" if is_shared else relative))
        ranks = [rank for rank, prefix in enumerate(LONGEST, 1) if relative.startswith(prefix)]
        order[item] = 0 if is_shared else min(ranks, default=len(LONGEST) + 1)
    items.sort(key=order.__getitem__)
