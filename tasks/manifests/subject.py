"""The subject stage's manifest: instance images with their captions and QC."""

from tasks.manifests.base import Manifest, ObjectRef, Record


class ImageMeasures(Record):
    """Image statistics of one photo, computed without a model."""

    width: int
    height: int
    sharpness: float
    """Variance of the Laplacian at 256 px on the short side, luma in 0..255."""
    brightness: float
    """Mean luma, 0..1."""
    contrast: float
    """Standard deviation of luma, 0..1."""
    perceptual_hash: str


class InstanceImage(Record):
    """One accepted photo of the subject."""

    image: ObjectRef
    source_name: str
    source_sha256: str
    measures: ImageMeasures
    inspection: dict[str, str | bool]
    caption: str
    """Caption with the class noun, without the identifier token."""
    surroundings: str
    view: str
    """The caption's two phrases."""
    instance_prompt: str
    mask: ObjectRef | None = None
    """Where the subject is (white), for a photo with a transparent background."""
    focus: tuple[float, float] | None = None
    """Center of the inspector's bounding box of the subject, as fractions of width and height."""


class RejectedImage(Record):
    """One rejected photo, with the reason."""

    source_name: str
    source_sha256: str
    reason: str
    thumbnail: ObjectRef | None = None


class SubjectSet(Manifest):
    """Instance images with their captions and QC."""

    class_noun: str
    identifier_token: str
    images: tuple[InstanceImage, ...]
    rejected: tuple[RejectedImage, ...]
    quarantined: tuple[RejectedImage, ...] = ()
    """Photos that no model could annotate; a manual caption reinstates them."""
    traits: tuple[str, ...] = ()
    """Invariant traits of the subject, which captions must not name."""
    leaks: tuple[str, ...] = ()
    """Trait words that were removed from captions, as `photo: words`."""
    warnings: tuple[str, ...] = ()
    """Findings for manual review."""
    unknown_world: str = ""
    """Why the photos are outside the domain of the base model, where training is allowed nevertheless."""
    sources: tuple[str, ...] = ()
    """Web pages that support the warnings about names."""
    reasoning: ObjectRef | None = None
    """The adjudicator's reasoning by photo, where the provider returns it."""
