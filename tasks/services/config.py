"""Settings of the store and of tracking."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tasks.config_base import OPERATOR_ONLY, LocalPath, OperatorText, PlainName, PlainText, Section, check_url


class StoreConfig(Section):
    """The object store."""

    kind: Literal["local", "s3"] = Field(description="a local folder or an S3 bucket")
    folder: LocalPath = Field(description="root folder (kind: local); empty: store in output_dir")
    cache_gb: float = Field(
        ge=0,
        le=100_000,
        description="bound of the local copies of a bucket's objects, in GB; 0: no copies",
    )
    bucket: OperatorText = Field(description="bucket name (kind: s3)")
    prefix: OperatorText = Field(description="key prefix inside the bucket (kind: s3)")
    endpoint_url: OperatorText | None = Field(description="S3-compatible endpoint; null is AWS")
    region: OperatorText = Field(description="region of the bucket")
    check_endpoint = field_validator("endpoint_url")(check_url)
    request_checksums: Literal["when_supported", "when_required"] = Field(
        description="when_required suits stores that refuse new checksum headers"
    )
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        description="path suits S3-compatible stores without a host name for each bucket"
    )
    max_attempts: int = Field(
        ge=1, le=20, description="attempts of a request; pauses between them double from at most 1 s to at most 20 s"
    )
    max_upload_rate: float | None = Field(
        gt=0, le=1e6, description="bound on uploads of files such as checkpoints, in MB/s; null: no bound"
    )


def find_cache(store_folder: str | Path) -> Path:
    """Return the folder of copies of a bucket's objects: beside the one that a local store has."""
    folder = Path(store_folder)
    return folder.with_name(f"{folder.name}-cache")


TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


def check_tracking_uri(uri: str) -> str:
    """Return a tracking URI. Raises ValueError for other schemes, and for URIs that may hold secrets."""
    check_url(uri)
    scheme = uri.partition(":")[0].partition("+")[0]
    if uri and (scheme not in TRACKING_SCHEMES or "://" not in uri):
        raise ValueError(f"must begin with one of {', '.join(f'{known}://' for known in TRACKING_SCHEMES)}")
    # MlflowTracker takes everything after `sqlite:///` as a path.
    if scheme == "sqlite" and ("?" in uri or "file:" in uri):
        raise ValueError("must be sqlite:///PATH, without parameters")
    return uri


class TrackingConfig(Section):
    """Where metrics and artifacts are tracked."""

    kind: Literal["mlflow", "none"] = Field(description="mlflow, or no tracking")
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = Field(description="additional loggers")
    wandb_mode: Annotated[Literal["offline", "online"], OPERATOR_ONLY] = Field(description="online needs WANDB_API_KEY")
    uri: OperatorText = Field(description="tracking URI; empty is an SQLite file in output_dir")
    check_uri = field_validator("uri")(check_tracking_uri)
    experiment: PlainText = Field(description="experiment name")
    registered_model: PlainName = Field(description="registry name; empty: likeness-<class noun>")
    max_wait_seconds: float = Field(
        ge=0, le=86_400, description="how long the publication waits for a server that does not answer"
    )
    system_metrics_interval: float | None = Field(
        ge=0.1, le=3_600, description="seconds between samples of CPU, memory, disk, network and GPU; null: none"
    )
    llm_traces: bool = Field(description="one MLflow trace per LLM call: models, tokens, cost, time; no text or image")
