"""Which encoders measure."""

from pydantic import Field

from tasks.settings import Section


class EncoderConfig(Section):
    """The image encoders that measure; a local folder or a hub repository at a revision."""

    clip: str = Field(description="CLIP model: CLIP-I and CLIP-T")
    clip_revision: str | None = Field(None, description="pinned commit of the CLIP model")
    dino: str = Field(description="self-supervised ViT: DINO")
    dino_revision: str | None = Field(None, description="pinned commit of the DINO model")
