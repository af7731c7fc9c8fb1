"""Settings of the publishing stage."""

from pydantic import Field

from tasks.config_base import PlainText, Section


class PublishingConfig(Section):
    """What a run publishes."""

    is_registered: bool = Field(description="register the tuned model with the tracking server")
    title: PlainText = Field(
        max_length=120, description="title of report and model card; empty: made from the class noun"
    )
