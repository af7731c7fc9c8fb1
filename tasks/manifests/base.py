"""What stages hand each other: small frozen records of references, digests, counts and settings.

A stage's output is a folder of objects in the store plus one of these, written last as
`manifest.json`: the manifest's existence is completion.
"""

import re
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tasks.stage.digests import digest

Side = Literal["base", "tuned"]
SampleKind = Literal["subject", "class", "candidate"]


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


class Manifest(Record):
    """What every stage says of its output."""

    stage: str
    stage_key: str
    stage_version: int
    seconds: float
    """Wall time the stage took when it was computed."""
    cost_usd: float | None = 0.0
    """Money paid for it; None where a price is unknown."""
    counts: dict[str, int]
    objects: tuple[ObjectRef, ...]
    """Every object of the stage's folder but the manifest itself."""

    NOT_RESULT: ClassVar[frozenset[str]] = frozenset({"stage_key", "seconds", "cost_usd", "counts"})
    """Fields that say how a result came about, not what it is."""

    def compute_content_digest(self) -> str:
        """Return the digest of what the stage made: its objects and result fields.

        Stages below are keyed by it: the same result computed again, elsewhere or under another key, invalidates
        nothing, and another result under the same key invalidates everything below.
        """
        plain = self.model_dump(mode="json", exclude=set(self.NOT_RESULT))
        return digest(without_stage_keys(plain))

    def find(self, name: str) -> ObjectRef:
        """Return the object whose key ends with the given name."""
        return next(ref for ref in self.objects if ref.key.endswith("/" + name))


STAGE_FOLDER = re.compile(r"^(\d\d-[a-z]+)/[^/]+/")


def without_stage_keys(value: Any) -> Any:
    """Return nested plain data whose object keys don't say in which stage's folder they lie."""
    if isinstance(value, dict):
        return {without_stage_keys(key): without_stage_keys(child) for key, child in value.items()}
    if isinstance(value, list):
        return [without_stage_keys(child) for child in value]
    return STAGE_FOLDER.sub(r"\1/", value) if isinstance(value, str) else value


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
    """What the adjudicator thought aloud, by photo, where its provider tells."""


class ClassImage(Record):
    """One image of the prior-preservation set."""

    image: ObjectRef
    seed: int


class ClassImageSet(Manifest):
    """Class images drawn once from the frozen base model."""

    class_prompt: str
    base_model: ModelRef
    images: tuple[ClassImage, ...]


class TunedModel(Manifest):
    """The fine-tuned weights and how they came to be."""

    base_model: ModelRef
    model: tuple[ObjectRef, ...]
    """Below `model/`: a diffusers folder, or adapters (LoRA, learned token) for the base model."""
    family: str
    method: str
    num_steps: int
    published_step: int
    """The step whose weights these are: the last, or the best."""
    trainable_parameters: int
    total_parameters: int
    final_loss: float
    peak_memory_bytes: int
    subject_sha256: str
    """Content digest of the subject set that it was trained on."""
    prior_sha256: str
    NOT_RESULT: ClassVar[frozenset[str]] = Manifest.NOT_RESULT | {"peak_memory_bytes"}

    def find_candidates(self) -> "dict[int, list[ObjectRef]]":
        """Return the weights that were kept beside the published ones, by step."""
        found: dict[int, list[ObjectRef]] = {}
        for ref in self.objects:
            step = re.search(r"/candidates/step-(\d+)/", ref.key)
            if step:
                found.setdefault(int(step[1]), []).append(ref)
        return found


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


class Judgement(Record):
    """What the judge said of one sample, 0 (worst) to 4; of repeated grades the median."""

    sample: ObjectRef
    side: Side
    prompt: str
    evidence: str
    concept_preservation: float
    prompt_following: float
    image_quality: float
    num_repeats: int = 1
    spread: int = 0
    """Largest less smallest of repeated grades, on the axis where they differ most."""
    settled: tuple[str, ...] = ()
    """Axes on which grades differed much, so that one more look, with reasoning, decided."""


class SideScores(Record):
    """Mean scores, 0 to 4."""

    concept_preservation: float
    prompt_following: float
    image_quality: float


class ControlResult(Record):
    """A question whose answer is known, asked among the others."""

    name: str
    text: str
    """What was asked and what is expected."""
    value: float
    limit: float
    is_passed: bool


class PairResult(Record):
    """Base against tuned, each pair in both orders; only consistent answers are wins."""

    num_pairs: int
    tuned_wins: int
    base_wins: int
    ties: int
    inconsistent: int
    tuned_strength: float
    """Bradley-Terry, 0 to 1."""


class CheckpointRank(Record):
    """How the weights of one step did against those of the others, drawn alike; each pair in both orders."""

    step: int
    is_published: bool
    strength: float
    """Bradley-Terry; all steps sum to one."""
    wins: int
    losses: int
    undecided: int
    """Ties, and answers that changed with the order."""


class Agreement(Record):
    """How another rater's grades agree with the judge's, by axis; None where it can't be told."""

    rater: str
    num_samples: int
    kappa: dict[str, float | None]
    spearman: dict[str, float | None]


class JudgeReliability(Record):
    """What is known of the judge itself."""

    controls: tuple[ControlResult, ...]
    alpha: dict[str, float | None]
    """Krippendorff's alpha between repeated grades, by axis; None where all were the same."""
    num_repeated: int
    is_comparable: bool
    """Whether the model that was asked for gave every grade."""
    is_reliable: bool
    """Whether there are controls, all are passed, and the grades are comparable."""
    others: tuple[Agreement, ...] = ()
    spearman: dict[str, float | None] = {}
    """Rank correlation over samples: of likeness with DINO, of following the prompt with CLIP-T."""


class Scorecard(Manifest):
    """The judge's scores."""

    served_model: str
    judgements: tuple[Judgement, ...]
    failed: tuple[str, ...]
    """JudgeRequests that got no valid answer, as `name: reason`."""
    scores: dict[Side, SideScores]
    intervals: dict[Side, dict[str, tuple[float, float]]]
    """Bootstrap intervals (95 %) of the mean scores."""
    health: JudgeReliability
    pairs: PairResult | None = None
    checkpoints: tuple[CheckpointRank, ...] = ()
    """Best first; empty where one step's weights were kept."""
    reasoning: ObjectRef | None = None
    """What judges thought aloud, by question, where their provider tells."""


class Publication(Manifest):
    """Where the tuned model and its report went."""

    registered_model: str | None
    registered_version: str | None
    tracking_run_id: str | None
    report: ObjectRef
    sample_grid: ObjectRef
    model: tuple[ObjectRef, ...]
