"""Settings of the publishing stage."""

from pydantic import Field

from tasks.settings import Section


class PublishingConfig(Section):
    """What is made public of a run."""

    is_registered: bool = Field(True, description="register the tuned model with the tracking server")
    title: str = Field("", description="title of report and model card; empty: made from the class noun")
