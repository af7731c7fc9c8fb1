"""The publishing stage: model folder, report, registry."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.client.schemas.objects import State

from tasks.manifests.evaluation import Evaluation
from tasks.manifests.publishing import REPORT_PATH, Publication
from tasks.manifests.run import RunManifests
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import LossRow
from tasks.publishing.config import PublishingConfig
from tasks.services.config import TrackingConfig
from tasks.stage.cache import Stage, StageFolder, fetch_folder
from tasks.stage.context import Runtime
from tasks.stage.files import make_part_prefix, write_atomic
from tasks.stage.states import finished, should_retry

if TYPE_CHECKING:
    from tasks.publishing.model_card import CardInputs
    from tasks.publishing.registry import TrackedRun
    from tasks.publishing.report.page import ReportInputs

STAGE_VERSION = 8

UNKEYED_TRACKING = {"max_wait_seconds", "system_metrics_interval", "llm_traces"}
"""Settings of tracking that a cached publication may differ in."""


@dataclass(frozen=True)
class PublishingInputs:
    """Everything that a publication depends on."""

    config: PublishingConfig
    tracking: TrackingConfig
    manifests: RunManifests
    config_rows: tuple[tuple[str, str], ...]
    """The run's configuration as it is shown: dotted names and values. Not part of the key."""
    default_rows: tuple[tuple[str, str], ...] = ()
    """The same of a run without any setting."""

    def stage(self) -> Stage[Publication]:
        """Return the stage with its cache key."""
        return Stage(
            "publishing",
            Publication,
            STAGE_VERSION,
            # The tracking server is part of the key: a publication names a run and a version on it.
            # Promotion is no part of it: the alias moves after the run is published, and by command.
            settings=[
                self.config.model_dump(mode="json", exclude={"is_promoted"}),
                self.tracking.model_dump(mode="json", exclude=UNKEYED_TRACKING),
            ],
            # Why these weights were picked stands in the model card; the weights themselves are the inputs'.
            inputs=(*self.manifests.content_digests(), self.manifests.published_because),
        )

    @property
    def title(self) -> str:
        """The report's title."""
        subject = self.manifests.subject
        return self.config.title or f"One {subject.class_noun}, from {len(subject.images)} photos"

    @property
    def card(self) -> "CardInputs":
        """What the model card says beside the manifests."""
        from tasks.publishing.model_card import CardInputs

        return CardInputs(self.title, self.config.gate, dict(self.config_rows))


# Safe to retry: `track_run` deletes what an earlier attempt with the same key has logged.
@task(
    name="publishing",
    persist_result=False,
    retries=1,
    retry_delay_seconds=3,
    retry_jitter_factor=1,  # runs that an outage failed together don't return together
    retry_condition_fn=should_retry,
)
def publish(inputs: PublishingInputs, runtime: Runtime) -> State[Publication]:
    """Publish model and report, or return the cached publication if its effects still exist."""
    manifest = runtime.run_stage(
        inputs.stage(),
        lambda folder: compute_publication(folder, inputs, runtime),
        find_missing_effect=lambda manifest: find_missing_effect(manifest, inputs.tracking, runtime),
    )
    return finished(manifest, runtime)


def find_missing_effect(publication: Publication, config: TrackingConfig, runtime: Runtime) -> str:
    """Return which side effect of a cached publication is missing on the tracking server, or an empty string.

    Raises ServiceUnavailable where the server doesn't answer in time.
    """
    from tasks.services.tracking.open import wait_reachable

    # Only what lies on the tracking server: `find_manifest` has verified the objects in the store.
    if publication.tracking_run_id is None:
        return ""
    # Before MLflow is called, whose own retries would block for minutes.
    wait_reachable(config, runtime.tracker, on_wait=runtime.wait_note("publishing"))
    tracker = runtime.tracker
    model = publication.registered_model, publication.registered_version
    paths = ("report", "model") if publication.registered_version else ("report",)
    if not tracker.has_artifacts(publication.tracking_run_id, paths):
        return f"tracking run {publication.tracking_run_id} or its artifacts are gone"
    if model[0] and model[1] and not tracker.has_version(model[0], model[1]):
        return f"version {model[1]} of the registered model {model[0]} is gone"
    return ""


def name_model(tracking: TrackingConfig, subject: SubjectSet) -> str:
    """Return the tuned model's name in the registry."""
    return tracking.registered_model or f"likeness-{subject.class_noun.replace(' ', '-').lower()}"


def track(run: "TrackedRun", config: TrackingConfig, runtime: Runtime) -> tuple[str | None, str | None]:
    """Log a run as soon as the tracking server answers; return the tracking run id and model version."""
    from tasks.publishing.registry import track_run
    from tasks.services.tracking.open import wait_reachable

    wait_reachable(config, runtime.tracker, on_wait=runtime.wait_note("publishing"))
    return track_run(runtime.tracker, run, live=runtime.live)


def tag_stages(manifests: RunManifests) -> dict[str, str]:
    """Return the keys of stages by tag: a comparison with the champion reads its manifests by them."""
    stages = {
        "training": manifests.training,
        "subject": manifests.subject,
        "evaluation": manifests.evaluation,
        "scoring": manifests.scoring,
    }
    return {f"likeness.{name}": manifest.stage_key for name, manifest in stages.items()}


def tag_prompts(evaluation: Evaluation) -> dict[str, str]:
    """Return the shipped set of prompts with its version by tag; nothing for others."""
    return {"likeness.prompt_set": evaluation.prompt_set.show()} if evaluation.prompt_set else {}


def describe_report(inputs: PublishingInputs, losses: list[LossRow]) -> "ReportInputs":
    """Return what the report shows."""
    from tasks.publishing.report.page import ReportInputs
    from tasks.publishing.report.usage import describe_model, write_snippets
    from tasks.publishing.versions import list_versions

    return ReportInputs(
        inputs.title, inputs.manifests, losses, inputs.config_rows, inputs.config.gate, dict(inputs.default_rows),
        list_versions(), write_snippets(describe_model(inputs.manifests.subject, inputs.manifests.training)),
    )  # fmt: skip


def compute_publication(folder: StageFolder, inputs: PublishingInputs, runtime: Runtime) -> Publication:
    """Write model folder and report, log to the tracking server, write the manifest."""
    from tasks.publishing.export import export_model, headline_metrics, read_losses, sum_llm_costs
    from tasks.publishing.registry import SAMPLES, TrackedRun, list_llm_calls
    from tasks.publishing.report.page import draw_sample_grid, render_report

    manifests = inputs.manifests
    subject, tuned = manifests.subject, manifests.training
    evaluation, scores = manifests.evaluation, manifests.scoring
    losses = read_losses(runtime.store, tuned)
    runtime.progress_callback("publishing")(0, 3)
    # In the output folder: on the store's file system, files are hard-linked instead of copied.
    runtime.work_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runtime.work_folder, prefix=make_part_prefix()) as name:
        local = Path(name)
        model = export_model(folder, manifests, card=inputs.card, local=local / "model")
        runtime.progress_callback("publishing")(1, 3)
        html = render_report(runtime.store, describe_report(inputs, losses)).encode()
        grid = draw_sample_grid(runtime.store, evaluation)
        report = folder.put(REPORT_PATH, html)
        write_atomic(local / REPORT_PATH, html)
        write_atomic(local / "report" / "samples.png", grid)
        grids = [ref for ref in tuned.objects if "/samples/" in ref.key]
        fetch_folder(runtime.store, grids, below="samples", folder=local / SAMPLES)
        runtime.progress_callback("publishing")(2, 3)
        paid, cost = sum_llm_costs((subject, scores))  # no other stage calls an LLM
        tracked = TrackedRun(
            name=runtime.run_id,
            params=dict(inputs.config_rows),
            tags={**tag_stages(manifests), **tag_prompts(evaluation), "likeness.llm_cost": cost},
            publication_key=folder.stage_key,
            losses=losses,
            figures=headline_metrics(evaluation, scores) | paid,
            folder=local,
            registered_model=name_model(inputs.tracking, subject) if inputs.config.is_registered else None,
            llm_calls=list_llm_calls(inputs.tracking, runtime.llm.ledger.path),
        )
        run_id, version = track(tracked, inputs.tracking, runtime)
    runtime.progress_callback("publishing")(3, 3)
    return folder.finish(
        Publication(
            **folder.head(STAGE_VERSION, counts={"files": len(model) + 1}),
            registered_model=name_model(inputs.tracking, subject) if version else None,
            registered_version=version,
            tracking_run_id=run_id,
            report=report,
            sample_grid=folder.put("samples.png", grid),
            model=model,
            published_step=tuned.published_step,
            published_because=manifests.published_because,
        )
    )
