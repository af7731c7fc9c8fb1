"""Records that stages exchange: references, digests, counts and settings, all frozen.

A stage's output is a folder of objects in the store plus one of these, written last as
`manifest.json`: a stage is complete if and only if its manifest exists.
"""

import re
from pathlib import PurePosixPath
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tasks.stage.digests import digest


class Record(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ObjectRef(Record):
    """One object in the store."""

    key: str
    sha256: str
    size_bytes: int = Field(ge=0)

    @field_validator("key")
    @classmethod
    def check_key(cls, key: str) -> str:
        """Refuse keys that could leave the store's root."""
        path = PurePosixPath(key)
        if not key or path.is_absolute() or ".." in path.parts or "\\" in key or not key.isprintable():
            raise ValueError("is not a plain relative path")
        return key


class ModelRef(Record):
    """The weights that a stage used, by content."""

    location: str
    revision: str | None
    sha256: str


class Machine(Record):
    """Where a stage was computed."""

    system: str
    """Operating system and instruction set."""
    device: str
    """Name of the GPU, or cpu."""
    num_devices: int = 1
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the packages that compute."""


class Manifest(Record):
    """The fields that the manifests of all stages have in common."""

    stage: str
    stage_key: str
    stage_version: int
    seconds: float
    """Wall time the stage took when it was computed."""
    cost_usd: float | None = 0.0
    """Cost of computing it; None where a price is unknown."""
    counts: dict[str, int]
    objects: tuple[ObjectRef, ...]
    """Every object of the stage's folder but the manifest itself."""

    NOT_RESULT: ClassVar[frozenset[str]] = frozenset({"stage_key", "seconds", "cost_usd", "counts"})
    """Fields that describe the computation, not its result; the content digest excludes them."""

    def compute_content_digest(self) -> str:
        """Return the digest of the result: the objects and result fields of the stage.

        Downstream stages are keyed by it: the same result computed again, elsewhere or under another key, invalidates
        nothing, and another result under the same key invalidates everything downstream.
        """
        # Object references stay: their SHA-256 stands for the content of the files.
        plain = self.model_dump(mode="json", exclude=set(self.NOT_RESULT))
        return digest(without_stage_keys(plain))

    def find(self, name: str) -> ObjectRef:
        """Return the object whose key ends with the given name."""
        return next(ref for ref in self.objects if ref.key.endswith("/" + name))


# `<prefix>/<stage key>/`, for example `02-prior/1f3a.../`; the prefix is kept.
STAGE_FOLDER = re.compile(r"^(\d\d-[a-z]+)/[^/]+/")


def without_stage_keys(value: Any) -> Any:
    """Return nested plain data with the stage key removed from all object keys."""
    if isinstance(value, dict):
        return {without_stage_keys(key): without_stage_keys(child) for key, child in value.items()}
    if isinstance(value, list):
        return [without_stage_keys(child) for child in value]
    return STAGE_FOLDER.sub(r"\1/", value) if isinstance(value, str) else value
