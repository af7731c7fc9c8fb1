"""The evaluation stage's manifest: samples and their metrics."""

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
    """The prompt without the identifier token, used for CLIP-T."""
    seed: int
    step: int | None = None
    """The checkpoint that a candidate's sample is from."""


class SubjectMetrics(Record):
    """Means over samples; higher is better."""

    dino: float
    clip_i: float
    clip_t: float


class CeilingMetrics(Record):
    """The same metrics among the real photos: what copies of them would reach."""

    dino: float
    clip_i: float
    clip_t: float


class DriftMetrics(Record):
    """Prior drift: the effect of fine-tuning on the class."""

    pres: float
    """DINO similarity of class samples to the subject's photos; lower is better."""
    dino_div: float
    """Mean DINO distance among class samples; higher is better."""
    div: float | None = None
    """Mean LPIPS distance of samples of one prompt of the subject; higher is better. None: LPIPS has no weights."""


class Evaluation(Manifest):
    """Samples of base and tuned model, and their metrics."""

    samples: tuple[Sample, ...]
    metrics: dict[Side, SubjectMetrics]
    drift: dict[Side, DriftMetrics]
    ceiling: CeilingMetrics
    sample_metrics: dict[str, SubjectMetrics]
    """Metrics of each sample but those of the class, by object key."""
    published_step: int
