"""Settings of the scoring stage."""

from typing import Literal

from pydantic import Field

from tasks.settings import Section


class ScoringConfig(Section):
    """How the judge grades samples."""

    executor: Literal["batch", "sync"] = Field(
        "batch", description="batch: the provider's batch API; sync: one call after the other"
    )
    num_reference_images: int = Field(3, ge=1, le=8, description="photos shown beside each sample")
    poll_seconds: float = Field(5.0, gt=0, le=3600, description="longest wait between looks at a batch job")
    max_wait_seconds: float = Field(86_400, gt=0, description="give up waiting after this; run again later")
    max_failed_share: float = Field(0.1, ge=0, le=1, description="most samples that may stay unscored")
