"""The subject stage's manifest: instance images with their captions and QC."""

from tasks.manifests.base import Manifest, ObjectRef, Record


class ImageMeasures(Record):
    """What was measured of one photo, without any model."""

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
    """What the captioner saw, with the class noun and without the identifier token."""
    surroundings: str
    view: str
    """The caption's two phrases."""
    instance_prompt: str
    mask: ObjectRef | None = None
    """Where the subject is (white), for a photo with a transparent background."""
    focus: tuple[float, float] | None = None
    """Middle of the inspector's box around the subject, in shares of width and height."""


class RejectedImage(Record):
    """One photo that was left out, and why."""

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
    """Photos of which no model gave a usable word; a person's caption brings them back."""
    traits: tuple[str, ...] = ()
    """What is the same in all photos: what captions must not say."""
    leaks: tuple[str, ...] = ()
    """Trait words that captions said and that were cut, as `photo: words`."""
    warnings: tuple[str, ...] = ()
    """What a person should look at."""
    unknown_world: str = ""
    """Why the photos are not of the world that the base model knows, where they are trained on all the same."""
    sources: tuple[str, ...] = ()
    """Pages that the warnings about names rest on."""
    reasoning: ObjectRef | None = None
    """The adjudicator's reasoning by photo, where the provider returns it."""
