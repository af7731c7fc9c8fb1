"""The evaluation stage's manifest: samples and what was measured of them."""

from typing import Literal

from tasks.manifests.base import Manifest, ObjectRef, Record

Side = Literal["base", "tuned"]
SampleKind = Literal["subject", "class", "candidate"]


class Sample(Record):
    """One evaluation sample."""

    image: ObjectRef
    side: Side
    kind: SampleKind
    prompt: str
    class_prompt: str
    """The prompt without the identifier token: what CLIP-T compares with."""
    seed: int
    step: int | None = None
    """The step whose weights drew a candidate's sample."""


class SubjectMetrics(Record):
    """Means over samples; higher is better."""

    dino: float
    clip_i: float
    clip_t: float


class CeilingMetrics(Record):
    """The same measures among the real photos: what copying them would reach."""

    dino: float
    clip_i: float
    clip_t: float


class DriftMetrics(Record):
    """How the class itself looks after tuning."""

    pres: float
    """DINO similarity of class samples to the subject's photos; lower is better."""
    dino_div: float
    """Mean DINO distance among class samples; higher is better."""
    div: float | None = None
    """Mean LPIPS distance of samples of one prompt of the subject; higher is better. None: LPIPS has no weights."""


class Evaluation(Manifest):
    """Samples of base and tuned model, and what was measured of them."""

    samples: tuple[Sample, ...]
    metrics: dict[Side, SubjectMetrics]
    drift: dict[Side, DriftMetrics]
    ceiling: CeilingMetrics
    sample_metrics: dict[str, SubjectMetrics]
    """Every sample of the subject by its object's key: its own part of the means."""
    published_step: int
