"""What a run shows in the Prefect UI: its name, link to the report, tables, the sample grid."""

import base64
import re
import secrets

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from conf.compose import compile_request, compute_config_digest
from conf.request import RunRequest
from tasks.errors import ConfigError
from tasks.manifests.evaluation import Estimate
from tasks.manifests.publishing import Publication
from tasks.manifests.run_summary import RunSummary
from tasks.stage.cache import read_verified
from tasks.stage.context import Runtime

NAMED = "likeness-named"
"""Tag of flow runs whose submitter has named them."""
OWN_NAME = re.compile(r".+-[0-9a-f]{6}-[0-9a-f]{4}")
"""As `make_name` makes them."""


def make_name(request: RunRequest) -> str:
    """Return a new name of a flow run: of subject, method and configuration. Raises ConfigError."""
    config = compile_request(request)
    noun = config.subject.class_noun.replace(" ", "-")
    return f"{noun}-{config.training.method}-{compute_config_digest(config)[:6]}-{secrets.token_hex(2)}"


def name_flow_run() -> str:
    """Return the name of the flow run in progress: as `make_name`, unless it was given one."""
    name = str(flow_run.name or "")
    # A name that Prefect or its form made up looks like a typed one.
    if NAMED in flow_run.tags or OWN_NAME.fullmatch(name):  # the latter in a second attempt
        return name
    try:
        return make_name(RunRequest.model_validate(flow_run.parameters["request"]))
    except (ConfigError, KeyError, ValueError):  # the flow refuses it with a message
        return name


def show_artifacts(summary: RunSummary, publication: Publication, runtime: Runtime) -> None:
    """Create the run's artifacts; nothing happens outside a flow run."""
    if FlowRunContext.get() is None:
        return
    assert summary.subject is not None
    assert summary.paths is not None
    # Prefect's artifact keys hold lowercase letters, digits and dashes only.
    noun, paths = summary.subject.class_noun.replace(" ", "-").lower(), summary.paths
    # No file:// link where no server shows it: browsers refuse them from a page on http.
    if report := summary.links.get("report"):
        create_link_artifact(link=report, link_text="report", key=f"report-{noun}", description="The run's report")
    create_table_artifact(table=metric_table(summary), key=f"metrics-{noun}", description="Base against tuned")
    create_table_artifact(table=stage_table(summary), key=f"stages-{noun}", description="Stages of this run")
    # Inline, since Prefect's UI can't read the store.
    grid = base64.b64encode(read_verified(runtime.store, publication.sample_grid)).decode()
    create_image_artifact(
        image_url=f"data:image/png;base64,{grid}", key=f"samples-{noun}", description="Above base, below tuned"
    )
    links = "".join(f"\n\n[{name}]({url})" for name, url in summary.links.items() if name != "prefect")
    text = f"Run `{summary.run_id}`\n\nReport: `{paths.report}`\n\nModel: `{paths.model}`{links}"
    create_markdown_artifact(markdown=text, key=f"run-{noun}")


def metric_table(summary: RunSummary) -> list[dict[str, object]]:
    """Return one row per metric and score."""
    rows: list[dict[str, object]] = []
    scores = {side: dict(score) for side, score in summary.scores.items()}
    estimates = {**summary.estimates, **summary.score_estimates}
    for group in (summary.metrics, scores):
        for name in dict.fromkeys(name for side in group.values() for name in side):
            sides = {side: values.get(name) for side, values in group.items()}
            known = estimates.get(name, {})
            own = {side: show_cell(value, known.get(side)) for side, value in sides.items()}
            gain = known["gain"].show_gain() if "gain" in known else ""
            rows.append({"measure": name, **own, "gain": gain})
    return rows


def show_cell(value: float | None, estimate: Estimate | None) -> object:
    """Return a mean, as text where it has an interval."""
    if estimate is not None and estimate.low is not None:
        return estimate.show()
    return "" if value is None else round(value, 4)


def stage_table(summary: RunSummary) -> list[dict[str, object]]:
    """Return one row per stage."""
    return [
        {"stage": name, "cached": stage.cached, "seconds": stage.seconds, "key": stage.key[:12]}
        for name, stage in summary.stages.items()
    ]
