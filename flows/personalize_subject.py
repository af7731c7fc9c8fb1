"""The main job: a few photos of one subject in, a tuned, scored, published model out."""

from typing import Any

from prefect import flow
from prefect.runtime import deployment

from conf.request import RunRequest
from flows.artifacts import show_artifacts
from flows.run_context import open_run
from tasks.evaluation.steps import evaluate
from tasks.prior.steps import generate_class_images
from tasks.publishing.steps import publish
from tasks.scoring.steps import score_samples
from tasks.stage.states import result_of
from tasks.subject.steps import check_photos, prepare_subject
from tasks.training.steps import fine_tune


@flow(name="personalize-subject", persist_result=False)
def personalize_subject(request: RunRequest = RunRequest()) -> dict[str, Any]:  # noqa: B008 - frozen
    """Turn a few photos of one subject into a tuned, scored, published model.

    Every stage is looked up by its content first; what is stored is not computed again.
    """
    with open_run(request, is_trusted=deployment.id is None) as run:
        config, runtime = run.config, run.runtime
        photos = check_photos(config.subject, runtime, is_drawn_world=config.is_mini)
        # Class images need only the class noun, so they are drawn while the LLM looks at the photos.
        drawing = generate_class_images.submit(
            config.prior, config.diffusion, config.subject.class_noun, run.base_model, runtime
        )
        subject = result_of(prepare_subject(config.subject, config.llm, photos, runtime))
        prior = drawing.result()
        encoders = config.evaluation.encoders
        tuned = result_of(fine_tune(config.training, config.diffusion, config.seed, subject, prior, encoders, runtime))
        evaluation = result_of(evaluate(config.evaluation, config.diffusion, tuned, subject, runtime))
        scores = result_of(score_samples(config.scoring, config.llm, evaluation, subject, runtime))
        upstream = (subject, prior, tuned, evaluation, scores)
        publication = result_of(publish(config.publishing, config.tracking, run.config_rows, upstream, runtime))
        summary = run.summarize((*upstream, publication))
        show_artifacts(summary, publication, runtime)
    return summary
