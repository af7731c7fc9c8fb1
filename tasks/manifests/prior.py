"""The prior stage's manifest: class images."""

from tasks.manifests.base import Manifest, ModelRef, ObjectRef, Record


class ClassImage(Record):
    """One image of the prior-preservation set."""

    image: ObjectRef
    seed: int


class ClassImageSet(Manifest):
    """Class images generated once with the frozen base model."""

    class_prompt: str
    base_model: ModelRef
    images: tuple[ClassImage, ...]
