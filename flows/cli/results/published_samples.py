"""An evaluation's samples beside a published model, signed where a certificate is given."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Evaluation
from tasks.services.store.base import Store
from tasks.stage.cache import read_verified

if TYPE_CHECKING:
    from flows.cli.results.images.credentials import ContentCredentials

FOLDER = "samples/"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class SampleFiles:
    """Which samples are copied, by path, and whether they are signed."""

    refs: Mapping[str, ObjectRef] = field(default_factory=dict)
    credentials: "ContentCredentials | None" = None

    def read(self, store: Store, path: str) -> tuple[bytes, ObjectRef]:
        """Return a file as it is published, and what the manifest says of it."""
        ref = self.refs[path]
        data = read_verified(store, ref)
        if self.credentials is not None:
            data = self.credentials.sign(data, title=PurePosixPath(path).name)
        digest = hashlib.sha256(data).hexdigest()
        return data, ref.model_copy(update={"sha256": digest, "size_bytes": len(data)})


def find_signed(destination: Store, paths: Iterable[str]) -> list[str]:
    """Return which of some pictures are at a destination with a C2PA manifest."""
    return [path for path in paths if is_signed(destination.find_bytes(path) or b"")]


def is_signed(png: bytes) -> bool:
    """Whether a PNG has a C2PA manifest, valid or not: it is the chunk `caBX`. Needs no package."""
    at = len(PNG_HEAD)
    while png.startswith(PNG_HEAD) and at + 8 <= len(png):
        if png[at + 4 : at + 8] == b"caBX":
            return True
        at += 12 + int.from_bytes(png[at : at + 4])  # length, type, data, checksum
    return False


def list_samples(evaluation: Evaluation) -> dict[str, ObjectRef]:
    """Return the tuned model's samples of the subject by path, named by prompt and seed."""
    tuned = [sample for sample in evaluation.samples if sample.side == "tuned" and sample.kind == "subject"]
    named = {}
    for number, sample in enumerate(tuned, 1):
        prompt = re.sub(r"[^a-z0-9]+", "-", sample.prompt.lower())[:60].strip("-")
        named[f"{FOLDER}{number:03d}-{prompt}-{sample.seed}.png"] = sample.image
    return named
