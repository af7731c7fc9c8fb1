"""The summary of an evaluated model: that of a run, without training and publishing."""

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path

from conf.compose import compute_config_digest
from flows.runs.context import Run, collect_metrics, find_flow_run_id, find_links, summarize_judge, summarize_stage
from flows.runs.records import link_model, place_model, read_request, relate, stamp, write_report, write_summary
from tasks.manifests.publishing import LINEAGE
from tasks.manifests.run import RunManifests
from tasks.manifests.run_summary import SUMMARY_VERSION, EvaluatedModel, RunSummary, SubjectNames
from tasks.manifests.subject import SubjectSet
from tasks.stage.cache import PREFIXES

MAX_LINEAGE = 10_000_000
"""Bytes; those of 10,000 class images take one."""


def summarize_model(run: Run, manifests: RunManifests) -> RunSummary:
    """Write `report.html` and `summary.json`, and return the summary."""
    from tasks.diffusion.external.detection import detect

    runtime, location = run.runtime, read_request(run.folder).model
    subject, evaluation, scores = manifests.subject, manifests.evaluation, manifests.scoring
    external = detect(location)
    evaluated = EvaluatedModel(
        location=location, kind=external.kind, sha256=external.compute_digest(),
        num_unmatched_photos=count_unmatched_photos(external.path, subject),
    )  # fmt: skip
    write_own_report(run, manifests, evaluated)
    summary = RunSummary(
        schema_version=SUMMARY_VERSION,
        run_id=run.run_id,
        status="finished",
        config_digest=compute_config_digest(run.config),
        started_at=stamp(time.time() - run.elapsed()),
        flow_run_id=find_flow_run_id(),
        wall_seconds=round(run.elapsed(), 3),
        overhead_seconds=round(runtime.measure_overhead(run.started), 3),
        llm_calls=runtime.llm.ledger.count_calls(),
        training_steps=0,
        cost_usd=runtime.llm.ledger.sum_cost(),
        subject=SubjectNames(class_noun=subject.class_noun, identifier_token=subject.identifier_token),
        evaluated=evaluated,
        stages={name: summarize_stage(record) for name, record in runtime.records.items()},
        metrics=collect_metrics(evaluation),
        estimates=evaluation.estimates,
        kinds=evaluation.kinds,
        prompt_set=evaluation.prompt_set,
        prompts=evaluation.prompts,
        scores=dict(scores.scores),
        score_estimates=scores.estimates,
        judge=summarize_judge(scores),
        links=find_links(run.run_id),
    )
    write_summary(run.folder, summary)
    return summary


def warn_of_other_photos(run: Run, subject: SubjectSet) -> None:
    """Warn where the model was tuned on none of the photos, before it is measured with them."""
    from tasks.diffusion.external.detection import detect

    path = detect(read_request(run.folder).model).path
    num = count_unmatched_photos(path, subject)
    if num:
        run.runtime.progress.note(
            f"warning: none of the photos is among the {num} that {path} was tuned on, by its {LINEAGE}; photos of "
            "another subject say nothing of its quality"
        )


def count_unmatched_photos(path: Path, subject: SubjectSet) -> int:
    """Return how many photos a published model's lineage names, where the subject has none of them; else 0."""
    trained = read_photos(path / LINEAGE if path.is_dir() else path.with_name(LINEAGE))
    return 0 if trained & {image.source_sha256 for image in subject.images} else len(trained)


def read_photos(lineage: Path) -> frozenset[str]:
    """Return the digests of photos that a lineage file names; empty where it is missing, or not written by us."""
    if not lineage.is_file():  # a pipe or a device might never end
        return frozenset()
    try:
        with lineage.open("rb") as file:
            data = file.read(MAX_LINEAGE + 1)
        loaded = json.loads(data) if len(data) <= MAX_LINEAGE else None
    except (OSError, ValueError, RecursionError):
        return frozenset()
    photos = loaded.get("photos") if isinstance(loaded, dict) else None
    return frozenset(map(str, photos)) if isinstance(photos, list) else frozenset()


def write_own_report(run: Run, manifests: RunManifests, evaluated: EvaluatedModel) -> None:
    """Write the report of a run, without its training."""
    from tasks.publishing.report.page import ReportInputs, render_report
    from tasks.publishing.versions import list_versions

    inputs = ReportInputs(
        run.config.publishing.title or f"One {manifests.subject.class_noun}: {Path(evaluated.location).name}",
        manifests,
        losses=(),
        config_rows=run.config_rows,
        gate=run.config.publishing.gate,
        defaults=dict(run.default_rows),
        versions=list_versions(),
        snippets=list_snippets(run, manifests, evaluated),
        evaluated=evaluated,
    )
    write_report(run.folder, render_report(run.runtime.store, inputs), manifests.training.model)


def list_snippets(run: Run, manifests: RunManifests, evaluated: EvaluatedModel) -> list[tuple[str, str]]:
    """Return how to use the evaluated model, as the store holds it."""
    from tasks.publishing.report.usage import describe_model, write_command, write_python

    subject, tuned = manifests.subject, manifests.training
    stored = relate(run.runtime.store.describe(f"{PREFIXES['training']}/{tuned.stage_key}/model"), run.folder)
    link_model(run.folder, stored)
    place = place_model(run.folder, stored)
    # As the store holds it: a diffusers folder, or adapters under the names of a run's.
    used = replace(describe_model(subject, tuned), method="full" if evaluated.kind == "pipeline" else evaluated.kind)
    snippets = [
        *write_command(used, place),
        ("Compare with a run", f"likeness compare RUN {run.run_id} --output-dir {shlex.quote(place.output)}"),
    ]
    if place.comment:  # in a bucket: `likeness publish` takes models of runs alone
        return snippets
    return [*snippets, ("diffusers", write_python(used, place))]
