"""The summary of an evaluated model: that of a run, without training and publishing."""

import time

from conf.compose import compute_config_digest
from flows.runs.context import Run, collect_metrics, find_flow_run_id, find_links, summarize_judge, summarize_stage
from flows.runs.records import read_request, stamp, write_summary
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.run_summary import SUMMARY_VERSION, EvaluatedModel, RunSummary, SubjectNames
from tasks.manifests.scoring import Scorecard
from tasks.manifests.subject import SubjectSet


def summarize_model(run: Run, subject: SubjectSet, evaluation: Evaluation, *, scores: Scorecard) -> RunSummary:
    """Write `summary.json` and return it."""
    from tasks.diffusion.external.detection import detect

    runtime, location = run.runtime, read_request(run.folder).model
    external = detect(location)
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
        evaluated=EvaluatedModel(location=location, kind=external.kind, sha256=external.compute_digest()),
        stages={name: summarize_stage(record) for name, record in runtime.records.items()},
        metrics=collect_metrics(evaluation),
        estimates=evaluation.estimates,
        kinds=evaluation.kinds,
        prompts=evaluation.prompts,
        scores=dict(scores.scores),
        judge=summarize_judge(scores),
        links=find_links(run.run_id),
    )
    write_summary(run.folder, summary)
    return summary
