"""The files of checkpoints, without torch: their names, their manifest, and links to them."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.config_base import Section
from tasks.stage.files import make_part_prefix

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{8,}")


class CheckpointManifest(Section):
    """What a checkpoint says of itself, written last."""

    schema_version: int
    step: int
    fingerprint: dict[str, str]
    files: dict[str, str]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return checkpoint folders, newest step first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / MANIFEST).exists()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint folder is named after; quarantined names carry a further suffix."""
    return int(path.name.removeprefix("step-").split(".")[0])


@contextmanager
def link_checkpoint(path: Path) -> Iterator[Path]:
    """Yield a folder with hard links to a checkpoint's files: they stay while training deletes the checkpoint itself.

    Raises FileNotFoundError where it is deleted before it is linked.
    """
    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=make_part_prefix()) as name:
        for file in sorted(path.iterdir()):
            try:
                os.link(file, Path(name) / file.name)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without hard links
                shutil.copyfile(file, Path(name) / file.name)
        yield Path(name)
