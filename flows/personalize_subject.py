"""The main job: a few photos of one subject in, a tuned, scored, published model out."""

from prefect import flow
from prefect.runtime import deployment

from conf.request import RunRequest
from flows.runs.approval import ask_approval
from flows.runs.artifacts import name_flow_run, show_artifacts
from flows.runs.attempts import check_attempts, end_when_cancelled, find_finished_attempt, warn_of_clock
from flows.runs.context import open_run, trust_of_run
from tasks.evaluation.steps import EvaluationInputs, evaluate
from tasks.manifests.run import RunManifests
from tasks.manifests.run_summary import RunSummary
from tasks.prior.steps import PriorInputs, generate_class_images
from tasks.publishing.pick import pick_checkpoint
from tasks.publishing.steps import PublishingInputs, publish
from tasks.scoring.steps import ScoringInputs, score_samples
from tasks.stage.states import quoted, result_of, wait_for
from tasks.subject.steps import SubjectInputs, check_photos, prepare_subject
from tasks.training.inputs import TrainingInputs
from tasks.training.steps import fine_tune


@flow(name="personalize-subject", flow_run_name=name_flow_run, persist_result=False)
@end_when_cancelled
def personalize_subject(request: RunRequest = RunRequest()) -> RunSummary:  # noqa: B008 - frozen
    """Turn a few photos of one subject into a tuned, scored, published model.

    Every stage is looked up by its content first; what is cached is not computed again.
    """
    check_attempts()
    # A deployment's requests are data from elsewhere: they may set only what conf/trust.py allows.
    # Prefect passes the id on to subflows, so what `score-pending` resumes in a deployment is restricted too.
    is_trusted = deployment.id is None and trust_of_run.get()
    if (finished := find_finished_attempt(request, is_trusted=is_trusted)) is not None:
        return finished
    with open_run(request, is_trusted=is_trusted) as run:
        if deployment.id is not None:
            warn_of_clock()
        config, runtime, diffusion = run.config, quoted(run.runtime), run.config.diffusion
        # Checked before class images are submitted: bad photos must not cost a GPU hour.
        photos = check_photos(config.subject, runtime, is_drawn_world=config.is_mini)
        # Class images need only the class noun, so they are generated while the LLM inspects the photos.
        class_noun = config.subject.class_noun
        class_images = generate_class_images.submit(
            PriorInputs(config.prior, diffusion, run.base_model, class_noun), runtime
        )
        subject = result_of(prepare_subject(SubjectInputs(config.subject, config.llm, photos), runtime))
        if config.subject.approval == "ask":
            decided = ask_approval(run.question(subject))
            if decided != config.subject:  # prepared again: all replies of LLMs on accepted photos are cached
                photos = check_photos(decided, runtime, is_drawn_world=config.is_mini)
                subject = result_of(prepare_subject(SubjectInputs(decided, config.llm, photos), runtime))
        prior = wait_for(class_images)
        encoders = config.evaluation.encoders
        training = TrainingInputs(config.training, diffusion, encoders, config.seed, subject, prior)
        tuned = result_of(fine_tune(training, runtime))
        evaluation = result_of(evaluate(EvaluationInputs(config.evaluation, diffusion, tuned, subject), runtime))
        pick = pick_checkpoint(config.publishing, tuned, evaluation)
        if pick.model != tuned:  # measured and judged as what is published
            tuned = pick.model
            evaluation = result_of(
                evaluate(EvaluationInputs(config.evaluation, diffusion, pick.model, subject), runtime)
            )
        scores = result_of(score_samples(ScoringInputs(config.scoring, config.llm, evaluation, subject), runtime))
        manifests = RunManifests(subject, prior, tuned, evaluation, scores, pick.reason)
        inputs = PublishingInputs(config.publishing, config.tracking, manifests, run.config_rows, run.default_rows)
        publication = result_of(publish(inputs, runtime))
        summary = run.summarize(manifests, publication)
        show_artifacts(summary, publication, run.runtime)
    return summary
