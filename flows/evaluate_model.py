"""Evaluate a model that was trained elsewhere: the prompts, seeds, metrics and judge of a run, comparable with runs."""

from prefect import flow
from prefect.runtime import deployment

from conf.request import EvaluationRequest
from conf.trust import allowed_roots, check_path
from flows.runs.attempts import check_attempts, end_when_cancelled, find_finished_attempt
from flows.runs.context import open_run, trust_of_run
from flows.runs.evaluated import summarize_model, warn_of_other_photos
from tasks.config_base import RequestRule
from tasks.evaluation.steps import EvaluationInputs, evaluate
from tasks.manifests.run import RunManifests
from tasks.manifests.run_summary import RunSummary
from tasks.scoring.steps import ScoringInputs, score_samples
from tasks.stage.states import result_of
from tasks.subject.steps import SubjectInputs, check_photos, prepare_subject
from tasks.training.steps import ImportInputs, import_model


@flow(name="evaluate-model", persist_result=False)
@end_when_cancelled
def evaluate_model(request: EvaluationRequest) -> RunSummary:
    """Measure and judge a diffusers folder, a LoRA or an embedding beside its base model.

    Photos are inspected as in a run, so that the same photos of both are compared.
    """
    check_attempts()
    is_trusted = deployment.id is None and trust_of_run.get()  # a deployment's request stays restricted when resumed
    if (finished := find_finished_attempt(request.base, is_trusted=is_trusted)) is not None:
        return finished
    if not is_trusted:
        # As untrusted as the settings of a request.
        check_path("model", request.model, allowed_roots(), rule=RequestRule("path"))
    with open_run(request.base, is_trusted=is_trusted, model=request.model) as run:
        config, runtime, diffusion = run.config, run.runtime, run.config.diffusion
        photos = check_photos(config.subject, runtime, is_drawn_world=config.is_mini)
        subject = result_of(prepare_subject(SubjectInputs(config.subject, config.llm, photos), runtime))
        warn_of_other_photos(run, subject)
        imported = ImportInputs(request.model, diffusion, run.base_model, subject)
        tuned = result_of(import_model(imported, runtime))
        evaluation = result_of(evaluate(EvaluationInputs(config.evaluation, diffusion, tuned, subject), runtime))
        scores = result_of(score_samples(ScoringInputs(config.scoring, config.llm, evaluation, subject), runtime))
        # Without class images: only the base model's samples are needed to measure prior drift.
        summary = summarize_model(run, RunManifests(subject, None, tuned, evaluation, scores))
    return summary
