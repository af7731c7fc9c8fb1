"""An evaluation's samples beside a published model, signed where a certificate is given."""

import hashlib
import re
from collections.abc import Mapping
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


def list_samples(evaluation: Evaluation) -> dict[str, ObjectRef]:
    """Return the tuned model's samples of the subject by path, named by prompt and seed."""
    tuned = [sample for sample in evaluation.samples if sample.side == "tuned" and sample.kind == "subject"]
    named = {}
    for number, sample in enumerate(tuned, 1):
        prompt = re.sub(r"[^a-z0-9]+", "-", sample.prompt.lower())[:60].strip("-")
        named[f"{FOLDER}{number:03d}-{prompt}-{sample.seed}.png"] = sample.image
    return named
