"""The scoring stage's manifest: the judge's scores and how reliable they are."""

from typing import Literal

from pydantic import Field

from tasks.manifests.base import Manifest, ObjectRef, Record
from tasks.manifests.evaluation import Side, Table


class Judgement(Record):
    """The scores of one sample, 0 (worst) to 4; the median where grades are repeated."""

    sample: ObjectRef
    side: Side
    prompt: str
    evidence: str
    """Empty where the judge was asked for grades alone."""
    concept_preservation: float
    prompt_following: float
    image_quality: float
    num_repeats: int = 1
    spread: int = 0
    """Largest less smallest of repeated grades, on the axis where they differ most."""
    tie_breaks: tuple[str, ...] = ()
    """Axes whose grade comes from a tie-break request with reasoning, because grades differed too much."""


class SideScores(Record):
    """Mean scores, 0 to 4."""

    concept_preservation: float
    prompt_following: float
    image_quality: float


class ControlResult(Record):
    """A control: a request whose answer is known, sent among the others."""

    name: str
    text: str
    """The request and the expected answer."""
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
    """Rank of one checkpoint by pairwise comparison on the same prompts and seeds; each pair in both orders."""

    step: int
    is_published: bool
    strength: float
    """Bradley-Terry; all steps sum to one."""
    wins: int
    losses: int
    undecided: int
    """Ties, and answers that changed with the order."""


class Agreement(Record):
    """How another rater's grades agree with the judge's, by axis; None where it is undefined."""

    rater: str
    num_samples: int
    kappa: dict[str, float | None]
    spearman: dict[str, float | None]


class JudgeReliability(Record):
    """Reliability of the judge."""

    controls: tuple[ControlResult, ...]
    alpha: dict[str, float | None]
    """Krippendorff's alpha between repeated grades, by axis; None where all were the same."""
    num_repeated: int
    is_comparable: bool
    """Whether the requested model served every grade."""
    is_reliable: bool
    """Whether there are controls, all are passed, and the grades are comparable."""
    others: tuple[Agreement, ...] = ()
    spearman: dict[str, float | None] = Field(default_factory=dict)
    """Rank correlation over samples: concept preservation with DINO, prompt following with CLIP-T."""


class Scorecard(Manifest):
    """The judge's scores."""

    served_model: str
    evidence: Literal["before", "none"] = "before"
    """Whether the judge stated what it saw before it graded."""
    judgements: tuple[Judgement, ...]
    failed: tuple[str, ...]
    """Judge requests without a valid reply, as `name: reason`."""
    scores: dict[Side, SideScores]
    estimates: Table = Field(default_factory=dict)
    """Mean scores by axis with 95 % intervals over prompts; `gain` is tuned less base, paired by prompt and seed."""
    intervals: dict[Side, dict[str, tuple[float, float]]] = Field(default_factory=dict)
    """Of older manifests: intervals over samples, too narrow where a prompt has several."""
    reliability: JudgeReliability
    pairs: PairResult | None = None
    checkpoints: tuple[CheckpointRank, ...] = ()
    """Best first; empty where a single checkpoint is retained."""
    reasoning: ObjectRef | None = None
    """The judges' reasoning by request, where the provider returns it."""
