"""Tracking of metrics, artifacts and model versions with MLflow."""

import http.client
import logging
import os
import socket
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.errors import ConfigError, LikenessError, ServiceUnavailable, first_line
from tasks.redaction import redact_url
from tasks.services.config import TrackingConfig
from tasks.services.tracking.base import RUN_TAG, DatasetInfo, LlmCall, MetricRow, Version
from tasks.services.tracking.mlflow_files import (
    find_artifact_location,
    first_use,
    make_database,
    relocate_artifacts,
    silence,
)

log = logging.getLogger(__name__)
UI_VARIABLE = "LIKENESS_MLFLOW_URL"
"""Address at which people open the server of the runs: inside a network, or through SQLite, clients use another."""
BATCH_SIZE = 500
CHECK_SECONDS = 5.0
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
MISSING_CODES = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


class MlflowTracker:
    """MLflow through its client; by default on SQLite and a local artifact folder."""

    def __init__(self, config: TrackingConfig, *, folder: Path) -> None:
        self.config = config
        self.folder = folder.absolute()
        self.uri = config.uri or f"sqlite:///{self.folder / 'mlflow.db'}"
        self._client: Any = None
        self.run_id: str | None = None
        self.parent_run_id: str | None = None

    @property
    def client(self) -> Any:
        """The client; made on first use, since importing MLflow takes seconds."""
        if self._client is None:
            from mlflow import MlflowClient

            silence()
            if not self.config.uri:
                create_database(self.folder)
            with first_use(self.folder):
                if not self.config.uri:
                    relocate_artifacts(self.folder / "mlflow.db", self.folder / "artifacts")
                # Both addresses, since MLFLOW_REGISTRY_URI would otherwise redirect the registry.
                client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
                client.search_experiments(max_results=1)  # creates the tables of a database elsewhere
            self._client = client
        return self._client

    def check(self) -> None:
        """Reach the server without importing MLflow, which takes seconds. Raises ServiceUnavailable."""
        try:
            self.reach()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return  # the server answers; a refusal of the health check is not one of the API
            # An ingress without its server, or a server that fails: MLflow's own retries would block for minutes.
            raise ServiceUnavailable(
                f"tracking at {self.config.uri} answers with HTTP {error.code}; start it, or set tracking=none"
            ) from error
        except sqlite3.Error as error:
            raise ConfigError(
                f"tracking at {self.uri}: {error}; move the file away, set tracking.uri, or set tracking=none"
            ) from error
        except OSError as error:
            raise ServiceUnavailable(
                f"tracking at {self.config.uri} does not answer: {error}; start it, or set tracking=none"
            ) from error
        except (ValueError, http.client.HTTPException) as error:  # no address, or no server of MLflow's
            reason = f"{type(error).__name__} {error}".splitlines()[0]
            raise ConfigError(
                f"tracking at {self.config.uri} is no MLflow server: {reason}; set tracking.uri or tracking=none"
            ) from error

    def reach(self) -> None:
        """Open and close a connection to the server or database, or read the schema of an SQLite file."""
        address = urlsplit(self.config.uri)
        if address.scheme in ("http", "https"):
            health = f"{self.config.uri.rstrip('/')}/health"
            urllib.request.urlopen(health, timeout=CHECK_SECONDS).close()  # noqa: S310 - its scheme is known
        elif address.hostname:
            port = address.port or DATABASE_PORTS.get(address.scheme.partition("+")[0], 0)
            # A TCP connection needs neither the driver nor the credentials.
            socket.create_connection((address.hostname, port), timeout=CHECK_SECONDS).close()
        elif address.scheme in ("", "sqlite"):
            database = Path(self.uri.removeprefix("sqlite:///"))
            # A check does not create the database.
            if find_artifact_location(database, self.config.experiment).startswith("mlflow-artifacts:"):
                raise ConfigError(
                    f"artifacts of experiment {self.config.experiment!r} are reached through an MLflow server alone; "
                    "set tracking.uri to its address (`likeness status`), or another tracking.experiment"
                )

    def start(
        self, *, name: str, params: dict[str, str], tags: dict[str, str], started_ms: int | None = None
    ) -> str | None:
        """Open a run in the configured experiment, or continue the one with the same RUN_TAG."""
        with translated(self.uri):
            experiment_id = self.find_experiment()
            found = self.find_runs(RUN_TAG, tags[RUN_TAG]) if RUN_TAG in tags else []
            tags = {"mlflow.source.name": "likeness", "mlflow.source.type": "PROJECT", **tags}
            if self.parent_run_id:
                tags = {**tags, "mlflow.parentRunId": self.parent_run_id}
            # Found where an earlier call was carried out but its answer was lost.
            run = found[0] if found else self.client.create_run(experiment_id, started_ms, tags, name)
            self.run_id = str(run.info.run_id)
            self.log_params(params)
        return self.run_id

    def find_link(self, run_id: str, *, artifact: str = "") -> str:
        """Return the address of a run, or of an artifact of it, in MLflow's UI as people open it."""
        own = self.uri if self.uri.startswith(("http://", "https://")) else ""
        server = os.environ.get(UI_VARIABLE) or own
        if not server:
            return ""
        with translated(self.uri):
            # Without a password: the address is shown to people.
            link = f"{redact_url(server).rstrip('/')}/#/experiments/{self.find_experiment()}/runs/{run_id}"
        return f"{link}/artifacts/{artifact}" if artifact else link

    def forget(self, *, tag: str, value: str) -> list[str]:
        """Delete the runs with a tag, their traces, and the model versions made from them."""
        from tasks.services.tracking.llm_traces import delete_traces

        with translated(self.uri):
            runs = self.find_runs(tag, value)
            for run in runs:
                # The run last: a deleted one is not found by the next search, and the others would stay.
                delete_traces(self.client, run_id=str(run.info.run_id), experiment_id=str(run.info.experiment_id))
                versions = self.client.search_model_versions(f"run_id='{run.info.run_id}'")
                for version in versions:
                    self.client.delete_model_version(version.name, version.version)
                self.client.delete_run(run.info.run_id)
        return [str(run.info.run_id) for run in runs]

    def find_experiment(self) -> str:
        """Return the experiment's id, creating it where it is missing."""
        found = self.client.get_experiment_by_name(self.config.experiment)
        if found is not None:
            return str(found.experiment_id)
        # A server chooses the artifact location itself.
        location = None if self.config.uri else (self.folder / "artifacts").as_uri()
        with first_use(self.folder):
            found = self.client.get_experiment_by_name(self.config.experiment)
            if found is not None:  # another run made it in the meantime
                return str(found.experiment_id)
            return str(self.client.create_experiment(self.config.experiment, artifact_location=location))

    def find_runs(self, tag: str, value: str, condition: str = "") -> list[Any]:
        """Return the runs with a tag that are not deleted."""
        # Backticks, since names of tags contain dots.
        return list(self.client.search_runs([self.find_experiment()], f"tags.`{tag}` = '{value}'{condition}"))

    def close_stale(self, *, tag: str, value: str, except_run: str) -> None:
        """Mark runs with a tag as KILLED that are still RUNNING, except the one with that RUN_TAG."""
        with translated(self.uri):
            for run in self.find_runs(tag, value, " and attributes.status = 'RUNNING'"):
                if run.data.tags.get(RUN_TAG) != except_run:
                    self.client.set_terminated(run.info.run_id, "KILLED")

    def reopen(self, *, tag: str, value: str) -> bool:
        """Continue the newest run with a tag that is still RUNNING; return whether there is one."""
        with translated(self.uri):
            found = self.find_runs(tag, value, " and attributes.status = 'RUNNING'")
        self.run_id = str(found[0].info.run_id) if found else None
        return bool(found)

    def close_killed(self, run_id: str) -> None:
        """Mark a run as KILLED if it is still RUNNING; one that is deleted stays so."""
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                info = self.client.get_run(run_id).info
            except MlflowException as error:
                if error.error_code in MISSING_CODES:
                    return
                raise
            if info.status == "RUNNING" and info.lifecycle_stage == "active":
                self.client.set_terminated(run_id, "KILLED")

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        with translated(self.uri):
            self.client.set_tag(self.run_id, name, value)

    def log_datasets(self, datasets: Sequence[DatasetInfo]) -> None:
        """Log inputs, which the UI shows beside the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                dataset=Dataset(
                    name=info.name,
                    digest=info.digest[:36],  # MLflow's limit
                    source_type="likeness",
                    source=info.source,
                ),
                tags=[InputTag("mlflow.data.context", info.context)],
            )
            for info in datasets
        ]
        with translated(self.uri):
            self.client.log_inputs(self.run_id, datasets=inputs)

    def log_params(self, params: dict[str, str]) -> None:
        """Log parameters; MLflow takes at most 100 a call and 6000 characters each."""
        from mlflow.entities import Param

        items = [Param(key, value[:6000]) for key, value in params.items()]
        for start in range(0, len(items), 100):
            self.client.log_batch(self.run_id, params=items[start : start + 100])

    def log_metrics(self, rows: Iterable[MetricRow], *, at_ms: int | None = None) -> None:
        """Log metrics in batches of BATCH_SIZE: a call per value takes about 20 ms each."""
        from mlflow.entities import Metric

        timestamp = int(time.time() * 1000) if at_ms is None else at_ms
        metrics = [Metric(name, value, timestamp, step) for name, value, step in rows]
        with translated(self.uri):
            for start in range(0, len(metrics), BATCH_SIZE):
                self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH_SIZE])

    def log_folder(self, folder: Path, *, path: str) -> None:
        """Log a folder's files."""
        with translated(self.uri):
            self.client.log_artifacts(self.run_id, str(folder), artifact_path=path)

    def log_image(self, file: Path, *, key: str, step: int) -> None:
        """Log an image, which the UI shows with a slider over steps."""
        from PIL import Image

        with translated(self.uri), Image.open(file) as image:
            # Synchronous: an error in a thread of MLflow's would be lost.
            self.client.log_image(self.run_id, image.convert("RGB"), key=key, step=step, synchronous=True)

    def log_llm_calls(self, calls: Sequence[LlmCall]) -> None:
        """Log calls as traces, which the UI lists beside the run."""
        from tasks.services.tracking.llm_traces import log_traces

        with translated(self.uri):
            experiment_id = self.find_experiment()
            log_traces(self.client, calls, uri=self.uri, run_id=str(self.run_id), experiment_id=experiment_id)

    def register(self, *, name: str, path: str, description: str, tags: dict[str, str]) -> str | None:
        """Register the artifacts below a path as a new model version and move the alias `latest-tuned` to it."""
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # an earlier run has registered the model
                    raise
            run = self.client.get_run(self.run_id)
            source = f"{run.info.artifact_uri}/{path}"
            version = self.client.create_model_version(
                name, source, run_id=self.run_id, tags=tags, description=description
            )
            self.client.set_registered_model_alias(name, "latest-tuned", version.version)
        return str(version.version)

    def has_artifacts(self, run_id: str, paths: Sequence[str]) -> bool:
        """Whether a run exists, is not deleted, and has artifacts below each path."""
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                run = self.client.get_run(run_id)
                # `delete_run` only marks a run, and `get_run` still returns it.
                is_deleted = run.info.lifecycle_stage == "deleted"
                return not is_deleted and all(self.client.list_artifacts(run_id, path) for path in paths)
            except MlflowException as error:
                if error.error_code in MISSING_CODES:
                    return False
                raise

    def has_version(self, name: str, version: str) -> bool:
        """Whether the registry has a version of a model."""
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                self.client.get_model_version(name, version)
            except MlflowException as error:
                if error.error_code in MISSING_CODES:
                    return False
                raise
        return True

    def find_alias(self, name: str, alias: str) -> Version | None:
        """Return the model version that an alias names; None where there is none."""
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                found = self.client.get_model_version_by_alias(name, alias)
            except MlflowException as error:
                # A model without the alias is reported as an invalid parameter.
                if error.error_code in {*MISSING_CODES, "INVALID_PARAMETER_VALUE"}:
                    return None
                raise
        return Version(str(found.version), {str(tag): str(value) for tag, value in found.tags.items()})

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Move an alias to a version of a model."""
        with translated(self.uri):
            self.client.set_registered_model_alias(name, alias, version)

    def remove_alias(self, name: str, alias: str) -> None:
        """Remove an alias of a model, if there is one."""
        with translated(self.uri):
            self.client.delete_registered_model_alias(name, alias)

    def finish(self, *, is_failed: bool) -> None:
        """Close the run."""
        if self.run_id is not None:
            with translated(self.uri):
                self.client.set_terminated(self.run_id, "FAILED" if is_failed else "FINISHED")


def create_database(folder: Path, *, is_served: bool = False) -> None:
    """Create the database of an output folder, where there is none. Raises ServiceUnavailable, as for a full disk.

    With `is_served` as a server does that has an artifacts destination.
    """
    database = folder / "mlflow.db"
    with translated(f"sqlite:///{database}"), first_use(folder):
        make_database(database, default_artifacts="mlflow-artifacts:/" if is_served else "./mlruns")


class translated:  # noqa: N801 - reads as a statement
    """Map every error inside the block, of MLflow or its transport: a refusal to ConfigError, others to be retried."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, LikenessError):
            kind = ConfigError if is_refusal(error) else ServiceUnavailable
            raise kind(f"tracking at {self.uri}: {first_line(error)}") from error


def is_refusal(error: Exception) -> bool:
    """Whether a server has answered that it will never accept the request."""
    from mlflow.exceptions import MlflowException

    # Without an answer MLflow reports an internal error, 500; conflicts and rate limits pass with time.
    if not isinstance(error, MlflowException):
        return False
    status = error.get_http_status_code()  # type: ignore[no-untyped-call]
    if status == 404:
        # MLflow's client gives this code to a 404 that has none: of a proxy, while the server behind it restarts.
        return str(error.error_code) != "ENDPOINT_NOT_FOUND"
    return status in (400, 401, 403)
