"""The evaluation stage's manifest: samples and their metrics."""

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from tasks.manifests.base import Machine, Manifest, ObjectRef, Record

Side = Literal["base", "tuned"]
Shown = Literal["base", "tuned", "ceiling"]
"""Whose means are shown beside each other: those of samples, and of the real photos."""
SampleKind = Literal["subject", "class", "candidate"]
MIN_CLUSTERS = 5
"""With fewer, not even the interval from the smallest to the largest value covers a median with 95 %."""


class Sample(Record):
    """One evaluation sample."""

    image: ObjectRef
    side: Side
    kind: SampleKind
    prompt: str
    class_prompt: str
    """The prompt without the identifier token, used for CLIP-T."""
    seed: int
    template: str = ""
    """The prompt before subject and class noun were filled in; empty for class samples."""
    prompt_kind: str = ""
    """What the prompt tests, for example `scene` or `style`; empty for class samples."""
    step: int | None = None
    """The checkpoint that a candidate's sample is from."""


class OpenRecord(Record):
    """A record with further metrics by name: the registry's, and installed ones."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)


class SubjectMetrics(OpenRecord):
    """Means over samples, or one sample's values; of DINO, CLIP-I and CLIP-T, higher is better."""

    dino: float
    clip_i: float
    clip_t: float


class CeilingMetrics(OpenRecord):
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


class Estimate(Record):
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    """None where there are too few independent values for an interval."""
    num: int
    """Independent values: prompts, class samples, the samples of one prompt, or photos."""

    @property
    def is_decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def within(self, limits: tuple[float, float]) -> "Estimate":
        """Return it with the interval cut to a metric's range, which Student's t of a few values can leave."""
        if self.low is None or self.high is None:
            return self
        low, high = limits
        return self.model_copy(update={"low": max(self.low, low), "high": min(self.high, high)})

    def show(self, digits: int = 3) -> str:
        """Return the mean with its interval, where it has one: `0.710 [0.660, 0.750]`."""
        text = f"{self.mean:.{digits}f}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return text

    def show_gain(self) -> str:
        """Return a difference with its interval, where it has one."""
        text = f"{self.mean:+.3f}"
        if self.low is not None and self.high is not None:
            text += f" ({self.low:+.3f} to {self.high:+.3f})"
        return text.replace("-", "\N{MINUS SIGN}")


Table = dict[str, dict[str, Estimate]]
"""Estimates by metric, then by `base`, `tuned` and `gain`: tuned less base, paired by prompt and seed.

Over all prompts also by `ceiling`: among the real photos, over photos.
"""


class PromptRow(Record):
    """The metrics of one prompt."""

    template: str
    kind: str
    values: Table


class Protocol(Record):
    """How an evaluation was measured. Only equal ones are certain to compare; empty in older manifests."""

    encoders: str = ""
    """Digest of the encoders of the cosines, and of how pictures are prepared for them."""
    sampling: dict[str, str] = Field(default_factory=dict)
    """Sampling settings by name."""


class PromptSet(Record):
    """A shipped set of prompts, and the version of the file that it stands in."""

    name: str
    """Kind of subject and set: `object/thorough`."""
    version: int

    def show(self) -> str:
        """Return name and version as text."""
        return f"{self.name}, version {self.version}"


class Evaluation(Manifest):
    """Samples of base and tuned model, and their metrics."""

    samples: tuple[Sample, ...]
    metrics: dict[Side, SubjectMetrics]
    drift: dict[Side, DriftMetrics]
    ceiling: CeilingMetrics
    sample_metrics: dict[str, SubjectMetrics]
    """Metrics of each sample but those of the class, by object key."""
    estimates: Table = Field(default_factory=dict)
    kinds: dict[str, Table] = Field(default_factory=dict)
    """The same by kind of prompt, without class samples."""
    prompts: tuple[PromptRow, ...] = ()
    class_metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Metrics of each class sample, by object key; their means are those of the class."""
    dropped: dict[Side, int] = Field(default_factory=dict)
    """Samples that the base model's safety checker refused, by side; empty where nothing was checked."""
    published_step: int
    prompt_set: PromptSet | None = None
    """None: the prompts are a person's own, or the manifest is older."""
    protocol: Protocol = Field(default_factory=Protocol)
    machine: Machine | None = None
    """Of the samples and metrics; None in older manifests."""
    NOT_RESULT: ClassVar[frozenset[str]] = Manifest.NOT_RESULT | {"machine"}
