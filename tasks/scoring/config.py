"""Settings of the scoring stage."""

from typing import Literal

from pydantic import Field

from tasks.config_base import MOST_WAIT, LocalPath, Section


class ScoringConfig(Section):
    """How the judge grades samples, and how it is tested itself."""

    executor: Literal["batch", "sync"] = Field(
        description="batch: the provider's batch API; sync: calls, several at once"
    )
    num_reference_images: int = Field(ge=1, le=8, description="photos shown beside each sample")
    max_side: int = Field(ge=64, le=1024, description="pictures are shown to the judge at most this large, pixels")
    num_repeats: int = Field(ge=1, le=9, description="how often a repeated sample is graded, references reordered")
    num_repeated: int = Field(ge=0, le=1000, description="samples graded several times: is the judge steady?")
    num_controls: int = Field(ge=0, le=50, description="controls of each kind; 0: grades are never called reliable")
    num_pairs: int = Field(ge=0, le=1000, description="base and tuned samples compared directly, in both orders")
    num_checkpoint_pairs: int = Field(
        ge=0, le=64, description="draws on which weights kept of several steps are compared, in both orders"
    )
    disagreement_threshold: int = Field(
        ge=0, le=4, description="grades of one sample that differ so much are settled by one more look; 0: never"
    )
    second_judge_fraction: float = Field(ge=0, le=1, description="share of samples that the second judge grades too")
    labels: LocalPath = Field(description="CSV of a person's grades: sample,concept_preservation,prompt_following")
    poll_seconds: float = Field(ge=0.01, le=3600, description="longest wait between looks at a batch job")
    max_wait_seconds: float = Field(
        gt=0,
        le=MOST_WAIT,
        description="suspend the run after this; `likeness pending` goes on with it, the job runs on",
    )
    deadline_seconds: float | None = Field(
        gt=0,
        le=MOST_WAIT,
        description="cancel a batch job that has not ended so long after it was created, and ask what is left one by "
        "one, at full price; null: wait for it",
    )
    max_failed_share: float = Field(ge=0, le=1, description="most questions that may stay unanswered")

    def result_fields(self) -> dict[str, object]:
        """Return the fields that change the result: the ones that a stage key covers."""
        return self.model_dump(exclude={"executor", "poll_seconds", "max_wait_seconds", "deadline_seconds"})
