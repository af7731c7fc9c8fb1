"""Which encoders measure."""

from pydantic import Field

from tasks.settings import ModelName, PlainName, Section


class EncoderConfig(Section):
    """The image encoders that measure; a local folder or a hub repository at a revision."""

    clip: ModelName = Field(description="CLIP model: CLIP-I and CLIP-T")
    clip_revision: PlainName | None = Field(None, description="pinned commit of the CLIP model")
    dino: ModelName = Field(description="self-supervised ViT: DINO")
    dino_revision: PlainName | None = Field(None, description="pinned commit of the DINO model")
