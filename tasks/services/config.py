"""Settings of the store and of tracking."""

from typing import Literal

from pydantic import Field, field_validator

from tasks.settings import Section, refuse_user_info


class StoreConfig(Section):
    """Where objects live."""

    kind: Literal["local", "s3"] = Field("local", description="a local folder or an S3 bucket")
    folder: str = Field("${output_dir}/store", description="root folder (kind: local)")
    bucket: str = Field("", description="bucket name (kind: s3)")
    prefix: str = Field("likeness", description="key prefix inside the bucket (kind: s3)")
    endpoint_url: str | None = Field(None, description="S3-compatible endpoint; null is AWS")
    region: str = Field("us-east-1", description="region of the bucket")
    check_endpoint = field_validator("endpoint_url")(refuse_user_info)
    request_checksums: Literal["when_supported", "when_required"] = Field(
        "when_supported", description="when_required suits stores that refuse new checksum headers"
    )


class TrackingConfig(Section):
    """Where metrics and artifacts are tracked."""

    kind: Literal["mlflow", "none"] = Field("mlflow", description="mlflow, or no tracking")
    also: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="loggers beside it")
    wandb_mode: Literal["offline", "online"] = Field("offline", description="online wants WANDB_API_KEY")
    uri: str = Field("", description="tracking URI; empty is an SQLite file in output_dir")
    check_uri = field_validator("uri")(refuse_user_info)
    experiment: str = Field("likeness", description="experiment name")
    registered_model: str = Field("", description="registry name; empty: likeness-<class noun>")
