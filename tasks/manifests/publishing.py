"""The publishing stage's manifest: where the tuned model and its report went."""

from tasks.manifests.base import Manifest, ObjectRef

LINEAGE = "lineage.json"
"""File of a published model's folder that names every input by digest."""


class Publication(Manifest):
    """Where the tuned model and its report went."""

    registered_model: str | None
    registered_version: str | None
    tracking_run_id: str | None
    report: ObjectRef
    sample_grid: ObjectRef
    model: tuple[ObjectRef, ...]
    published_step: int
    """The step whose weights these are."""
    published_because: str
    """Why it was picked, see `publishing.pick`."""
