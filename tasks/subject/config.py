"""Settings of the subject stage."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.config_base import CHECKED, MAX_WAIT, Domains, LocalPath, PhotoSource, PlainText, Section


class WebLookupSettings(Section):
    """Whether an LLM looks the subject's names up on the web; it sees no photo."""

    enabled: bool = Field(description="look class noun and identifier token up on the web")
    query: PlainText = Field(max_length=80, description="product or breed to look up, for example: Maine Coon")
    domains: Domains = Field(max_length=5, description="search these sites only; empty: the whole web")


class SubjectConfig(Section):
    """Which photos, what they show, and what a photo must be."""

    source: PhotoSource = Field(description="folder of photos, or store:PREFIX in the object store")
    class_noun: Annotated[str, CHECKED] = Field(
        min_length=1,
        max_length=60,
        pattern=r"^[A-Za-z][A-Za-z -]*$",
        description="what the subject is, for example dog; a wrong noun costs the most quality",
    )
    identifier_token: Annotated[str, CHECKED] = Field(
        min_length=1,
        max_length=20,
        pattern=r"^[A-Za-z0-9]+$",
        description="rare token that the subject is bound to",
    )
    captioning: Literal["llm", "template"] = Field(
        description="llm: inspected and captioned by the LLM; template: no LLM at all"
    )
    captions: LocalPath = Field(description="CSV of your own captions: photo,surroundings,view; needs no model")
    batch_threshold: int = Field(ge=2, le=1_000_000, description="number of photos from which captions use a batch job")
    max_wait_seconds: float = Field(
        gt=0,
        le=MAX_WAIT,
        description="suspend the run when that job takes longer; `likeness pending` resumes it",
    )
    is_profiled: bool = Field(description="profile all photos in one LLM request: same subject, fitting class noun")
    web_lookup: WebLookupSettings
    max_leak_fraction: float = Field(
        ge=0, le=1, description="maximum fraction of captions that name invariant traits; 1 disables the check"
    )
    allow_unknown: bool = Field(
        description="train the mini model on photos outside of its synthetic domain; noted in the report"
    )
    min_images: int = Field(ge=1, le=1000, description="minimum number of accepted photos")
    max_images: int = Field(ge=1, le=1000, description="maximum number of photos")
    max_trained: int | None = Field(
        ge=1, le=1000, description="train on the best and most varied photos up to this number; null: all accepted ones"
    )
    excluded_photos: Annotated[tuple[Annotated[str, Field(max_length=200)], ...], CHECKED] = Field(
        max_length=1000, description="file names of photos that are not used"
    )
    approval: Literal["none", "ask"] = Field(
        description="ask: suspend the run until a person has decided on photos and captions, in Prefect's UI or by "
        "`likeness approve`"
    )
    approval_hours: float = Field(gt=0, le=8760, description="how long a person may take, in hours")
    approval_on_timeout: Literal["cancel", "approve"] = Field(
        description="what happens when nobody has decided by then"
    )
    min_side: int = Field(ge=16, le=8192, description="smallest side of a photo, pixels")
    max_aspect: float = Field(
        ge=1,
        le=100,
        description="maximum aspect ratio, long side over short side",
    )
    # The upper bound is Pillow's: it refuses images above 2 x Image.MAX_IMAGE_PIXELS, about 179 million pixels.
    max_pixels: int = Field(ge=4096, le=178_000_000, description="largest photo, pixels")
    working_side: int | None = Field(
        ge=64,
        le=8192,
        description="short side of stored photos, pixels; smaller ones keep their size; "
        "null: 1.5 x diffusion.resolution, at least 768",
    )
    min_sharpness: float = Field(
        ge=0, le=1e6, description="minimum variance of the Laplacian (luma 0..255 at 256 px); 0 disables the check"
    )
    min_brightness: float = Field(ge=0, le=1, description="minimum mean luma, 0..1")
    max_brightness: float = Field(ge=0, le=1, description="maximum mean luma, 0..1")
    min_contrast: float = Field(ge=0, le=1, description="minimum standard deviation of luma, 0..1")
    duplicate_distance: int = Field(
        ge=0, le=64, description="maximum Hamming distance of 64-bit perceptual hashes between duplicates"
    )
