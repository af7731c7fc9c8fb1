"""Settings of the metric encoders."""

from pydantic import Field

from tasks.config_base import LocalPath, ModelName, PlainName, Section


class EncoderConfig(Section):
    """The encoders of the metrics; each a local folder, or a hub repository at a revision."""

    clip: ModelName = Field(description="CLIP model: CLIP-I and CLIP-T")
    clip_revision: PlainName | None = Field(description="pinned commit of the CLIP model")
    dino: ModelName = Field(description="self-supervised ViT: DINO")
    dino_revision: PlainName | None = Field(description="pinned commit of the DINO model")
    dino_resize: int | None = Field(
        ge=16,
        le=4096,
        description="short side that pictures are scaled to before DINO's centre crop, as in the papers; "
        "null: as the encoder's own preprocessor_config says",
    )
    lpips: LocalPath = Field(
        description="LPIPS for DIV. auto: the package lpips and torchvision's cached AlexNet, where both are there; "
        "none; or the file of AlexNet's weights",
    )
