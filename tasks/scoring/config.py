"""Settings of the scoring stage."""

from typing import Literal

from pydantic import Field

from tasks.config_base import MAX_WAIT, LocalPath, Section


class ScoringConfig(Section):
    """How the judge grades samples, and how its reliability is measured."""

    executor: Literal["batch", "sync"] = Field(description="batch: the provider's batch API; sync: concurrent calls")
    num_reference_images: int = Field(ge=1, le=8, description="photos shown beside each sample")
    evidence: Literal["before", "none"] = Field(
        description="before: the judge states what it sees, then grades; none: grades alone"
    )
    max_side: int = Field(ge=64, le=1024, description="longest side of images sent to the judge, pixels")
    num_repeats: int = Field(ge=1, le=9, description="how often a repeated sample is graded, references reordered")
    num_repeated: int = Field(ge=0, le=1000, description="samples graded repeatedly, for the judge's consistency")
    num_controls: int = Field(ge=0, le=50, description="controls of each kind; 0: grades never count as reliable")
    num_pairs: int = Field(ge=0, le=1000, description="pairwise comparisons of base and tuned samples, in both orders")
    num_checkpoint_pairs: int = Field(
        ge=0, le=64, description="prompt and seed pairs of the pairwise checkpoint comparison, in both orders"
    )
    disagreement_threshold: int = Field(
        ge=0, le=4, description="grade difference from which a tie-break request is sent; 0: never"
    )
    second_judge_fraction: float = Field(ge=0, le=1, description="fraction of samples that the second judge grades too")
    labels: LocalPath = Field(description="CSV of a person's grades: sample,concept_preservation,prompt_following")
    poll_seconds: float = Field(ge=0.01, le=3600, description="longest interval between polls of a batch job")
    max_wait_seconds: float = Field(
        gt=0,
        le=MAX_WAIT,
        description="suspend the run after this; `likeness pending` resumes it, the job continues",
    )
    deadline_seconds: float | None = Field(
        gt=0,
        le=MAX_WAIT,
        description="age at which an unfinished batch job is cancelled and its remaining rows are sent as calls, at "
        "full price; null: wait for it",
    )
    max_failed_fraction: float = Field(ge=0, le=1, description="maximum fraction of failed requests")

    def result_fields(self) -> dict[str, object]:
        """Return the fields that affect the result, which the stage's cache key covers."""
        # Executors share one reply cache, and tests hold their grades equal.
        return self.model_dump(exclude={"executor", "poll_seconds", "max_wait_seconds", "deadline_seconds"})
