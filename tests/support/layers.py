"""Layers of tests by folder, and which tests stay together where several processes share them."""

import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent.parent
LAYERS = {
    "architecture": "unit",
    "chaos": "unit",
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
    "faults": "long",
    "tasks/training/process/test_fork_server.py": "long",
    "tasks/training/process/test_ranks.py": "long",
    "tasks/training/process/test_worker.py": "long",
    "flows/cli/scoreboard": "long",
    "flows/test_sweep_settings.py": "long",
    "flows/test_deployment.py": "long",
    "flows/test_evaluate_embedding.py": "long",
    "flows/test_own_server.py": "long",
    "flows/test_personalize_many.py": "long",
    "flows": "flow",
    "servers": "servers",
    "stack": "stack",
    "browser": "browser",
}
"""The layer of each folder or file; the nearest one counts."""
WHOLE_RUNS, FAULTS = "whole runs", "faults"
SHARED = ("sandbox", "first_run")
"""Fixtures of a session that take half a minute: files that name them run in one process."""
LONGEST = (
    "stack/test_local_stack", "stack/test_chaos",
    "tasks/training/process/", "faults/", "tasks/training/", "tasks/subject/photos/",
)  # fmt: skip
"""Begun right after the whole runs, so that no process is left alone with one of them at the end."""


def find_layer(path: Path) -> str:
    """Return the layer of a test file. Raises UsageError for a folder that nobody assigned."""
    relative = PurePosixPath(path.relative_to(TESTS).as_posix())
    for place in (relative, *relative.parents):
        if str(place) in LAYERS:
            return LAYERS[str(place)]
    raise pytest.UsageError(f"tests/{relative} is in no layer; add its folder to tests/support/layers.py")


def assign(items: list[pytest.Item]) -> None:
    """Mark tests with their layer; order files by length, whole runs first."""
    order: dict[pytest.Item, int] = {}
    for item in items:
        relative = item.path.relative_to(TESTS).as_posix()
        is_shared = find_group(f"tests/{relative}") == WHOLE_RUNS
        item.add_marker(find_layer(item.path))
        ranks = [rank for rank, prefix in enumerate(LONGEST, 1) if relative.startswith(prefix)]
        order[item] = 0 if is_shared else min(ranks, default=len(LONGEST) + 1)
    items.sort(key=order.__getitem__)


@cache
def find_group(path: str) -> str:
    """Return the group that a file's tests run in: its own, or that of all whole runs, or of all faults."""
    text = (TESTS.parent / path).read_text()
    if not re.search(rf"\b({'|'.join(SHARED)})\b", text):
        return path
    # Two groups of ten minutes rather than one of twenty, where all other processes have long finished.
    return FAULTS if path.startswith(f"tests/{FAULTS}/") else WHOLE_RUNS


def make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler of pytest-xdist that keeps groups together, in the order of `assign`.

    Its own `--dist loadgroup` writes groups into node ids, which pytest 9.2 ignores: every test would go alone.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return find_group(nodeid.split("::", 1)[0])

    config.option.loadscopereorder = False
    return GroupScheduling(config, log)
