"""The publishing stage: model folder, report, registry."""

import tempfile
from pathlib import Path
from typing import Any

from prefect import task

from tasks.contract import StageFolder, fetch_folder
from tasks.manifests import ClassImageSet, Evaluation, Publication, Scorecard, SubjectSet, TunedModel
from tasks.prefect_states import finished, should_retry
from tasks.publishing.config import PublishingConfig
from tasks.runtime import Runtime
from tasks.services.config import TrackingConfig

STAGE_VERSION = 3
Upstream = tuple[SubjectSet, ClassImageSet, TunedModel, Evaluation, Scorecard]


@task(name="publishing", persist_result=False, retries=1, retry_delay_seconds=3, retry_condition_fn=should_retry)
def publish(
    config: PublishingConfig,
    tracking: TrackingConfig,
    config_rows: list[tuple[str, str]],
    upstream: Upstream,
    runtime: Runtime,
) -> Any:
    """Publish model and report, or take what is published."""
    manifest = runtime.run_stage(
        Publication,
        "publishing",
        version=STAGE_VERSION,
        settings=[config.model_dump(mode="json"), tracking.model_dump(mode="json")],
        inputs=[manifest.stage_key for manifest in upstream],
        compute=lambda folder: compute_publication(folder, config, tracking, config_rows, upstream, runtime),
    )
    return finished(manifest, runtime)


def compute_publication(
    folder: StageFolder,
    config: PublishingConfig,
    tracking: TrackingConfig,
    config_rows: list[tuple[str, str]],
    upstream: Upstream,
    runtime: Runtime,
) -> Publication:
    """Write model folder and report, tell the tracking server, write the manifest."""
    from tasks.publishing.export import export_model, headline_metrics, read_losses, sum_llm_costs
    from tasks.publishing.registry import SAMPLES, track_run
    from tasks.publishing.report import ReportInputs, draw_sample_grid, render_report

    subject, prior, tuned, evaluation, scores = upstream
    title = config.title or f"One {subject.class_noun}, from {len(subject.images)} photos"
    losses = read_losses(runtime.store, tuned)
    runtime.show("publishing")(0, 3)
    with tempfile.TemporaryDirectory() as name:
        local = Path(name)
        model = export_model(
            folder, title=title, local=local / "model", subject=subject, prior=prior, tuned=tuned, evaluation=evaluation
        )
        runtime.show("publishing")(1, 3)
        inputs = ReportInputs(title, subject, prior, tuned, evaluation, scores, losses, config_rows)
        html = render_report(runtime.store, inputs)
        report = folder.put("report/index.html", html.encode())
        (local / "report").mkdir()
        (local / "report" / "index.html").write_text(html)
        grid = draw_sample_grid(runtime.store, evaluation)
        (local / "report" / "samples.png").write_bytes(grid)
        grids = [ref for ref in tuned.objects if "/samples/" in ref.key]
        fetch_folder(runtime.store, grids, below="samples", folder=local / SAMPLES)
        runtime.show("publishing")(2, 3)
        paid, cost = sum_llm_costs((subject, scores))
        tags = {"likeness.training": tuned.stage_key, "likeness.subject": subject.stage_key, "likeness.llm_cost": cost}
        registered = tracking.registered_model or f"likeness-{subject.class_noun.replace(' ', '-').lower()}"
        run_id, version = track_run(
            runtime.tracker,
            name=runtime.run_id,
            params=dict(config_rows),
            publication_key=folder.stage_key,
            tags=tags,
            losses=losses,
            figures=headline_metrics(evaluation, scores) | paid,
            folder=local,
            registered_model=registered,
            is_registered=config.is_registered,
        )
    runtime.show("publishing")(3, 3)
    return folder.finish(
        Publication,
        version=STAGE_VERSION,
        counts={"files": len(model) + 1},
        registered_model=registered if version else None,
        registered_version=version,
        tracking_run_id=run_id,
        report=report,
        sample_grid=folder.put("samples.png", grid),
        model=model,
    )
