"""`summary.json`: the summary in a run's folder (described in flows/README.md)."""

from typing import Literal

from pydantic import ConfigDict, Field

from tasks.manifests.base import Record
from tasks.manifests.evaluation import Estimate, PromptRow, PromptSet, Shown, Table
from tasks.manifests.scoring import CheckpointRank, PairResult, SideScores

SUMMARY_VERSION = 1
Status = Literal["running", "finished", "pending", "resumed", "failed", "cancelled", "killed", "damaged"]
"""`killed` and `damaged` are inferred on reading; no run writes them."""


class ProcessOwner(Record):
    """The process that executes a run."""

    host: str
    pid: int
    started: float
    """In seconds since its machine started; tells a process from a later one with the same id."""
    boot: str = ""
    """Which start of the machine."""


class StageSummary(Record):
    """Outcome of a stage; while the run is in progress, its key alone."""

    key: str = Field(pattern=r"^[\w.-]+$")
    cached: bool = False
    seconds: float = 0.0
    counts: dict[str, int] = Field(default_factory=dict)
    cost_usd: float | None = 0.0


class RunError(Record):
    """The error that ended a run."""

    kind: str
    message: str


class SubjectNames(Record):
    """How the subject is named in prompts."""

    class_noun: str
    identifier_token: str


class JudgeSummary(Record):
    """Whether the judge is reliable, and why not."""

    is_reliable: bool
    reason: str
    alpha: dict[str, float | None]
    spearman: dict[str, float | None]
    pairs: PairResult | None
    evidence: Literal["before", "none"] = "before"
    """Whether it stated what it saw before it graded."""


class EvaluatedModel(Record):
    """A model from elsewhere that was evaluated, not trained."""

    location: str
    kind: Literal["pipeline", "lora", "textual_inversion"]
    sha256: str
    num_unmatched_photos: int = 0
    """Photos that the model's `lineage.json` names, where none of them was evaluated with; else 0."""


class RegisteredModel(Record):
    """Name and version in the registry; None where nothing was registered."""

    model: str | None
    version: str | None
    is_champion: bool = False
    blockers: tuple[str, ...] = ()
    """Why the alias `champion` did not move to it; empty where it did, or nobody asked."""


class RunPaths(Record):
    """Relative to the run's folder, or addresses in a bucket."""

    report: str
    model: str
    manifests: dict[str, str]


class RunSummary(Record):
    """A run's summary; fields that are not known yet are unset."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = SUMMARY_VERSION
    run_id: str = Field(pattern=r"^[\w.-]+$")
    status: Status
    config_digest: str = ""
    started_at: str = ""
    """UTC."""
    owner: ProcessOwner | None = None
    flow_run_id: str = ""
    """Of Prefect; empty for a run outside a flow."""
    wall_seconds: float | None = None
    overhead_seconds: float | None = None
    """Seconds in which no stage was running."""
    llm_calls: int | None = None
    training_steps: int | None = None
    cost_usd: float | None = None
    """None where a price is unknown."""
    subject: SubjectNames | None = None
    evaluated: EvaluatedModel | None = None
    """The model of `likeness evaluate`; None for a run that trained its own."""
    stages: dict[str, StageSummary] = Field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """By side (`base`, `tuned`) and `ceiling`."""
    estimates: Table = Field(default_factory=dict)
    """Means with 95 % intervals by metric, then `base`, `tuned`, `gain` and `ceiling`."""
    kinds: dict[str, Table] = Field(default_factory=dict)
    """The same by kind of prompt."""
    prompt_set: PromptSet | None = None
    """The shipped set that the prompts are, with its version; None for others."""
    prompts: tuple[PromptRow, ...] = ()
    """The same by prompt."""
    scores: dict[str, SideScores] = Field(default_factory=dict)
    score_estimates: Table = Field(default_factory=dict)
    """Mean scores by axis with 95 % intervals, as `estimates`."""
    judge: JudgeSummary | None = None
    checkpoints: tuple[CheckpointRank, ...] = ()
    registered: RegisteredModel | None = None
    paths: RunPaths | None = None
    error: RunError | None = None
    links: dict[str, str] = Field(default_factory=dict)
    """Addresses of `prefect`, `mlflow` and `report`, where servers show this run."""
    resumed_by: str | None = None
    """The run that finished what this one began."""

    def find_mean(self, name: str, side: Shown = "tuned") -> Estimate | None:
        """Return the mean of a metric or score, with its interval where it has one; None: it was not measured."""
        for table in (self.estimates, self.score_estimates):
            if side in table.get(name, {}):
                return table[name][side]
        value = self.metrics.get(side, {}).get(name)
        if value is None and side in self.scores:
            value = getattr(self.scores[side], name, None)
        return None if value is None else Estimate(mean=value, num=0)


def make_head(run_id: str, status: Status) -> RunSummary:
    """Return a summary of which nothing but its status is known."""
    return RunSummary(schema_version=SUMMARY_VERSION, run_id=run_id, status=status)
