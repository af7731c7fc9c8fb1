"""The scoring stage: the judge's grades."""

from typing import Any

from prefect import task

from tasks.contract import StageFolder, read_verified
from tasks.manifests import Evaluation, Scorecard, SubjectSet
from tasks.prefect_states import finished, should_retry
from tasks.runtime import Runtime
from tasks.scoring.config import ScoringConfig
from tasks.services.llm.config import LlmConfig

STAGE_VERSION = 1


@task(name="scoring", persist_result=False, retries=1, retry_delay_seconds=3, retry_condition_fn=should_retry)
def score_samples(
    config: ScoringConfig, llm: LlmConfig, evaluation: Evaluation, subject: SubjectSet, runtime: Runtime
) -> Any:
    """Have the samples graded, or take the stored grades."""
    settings = [config.num_reference_images, config.max_failed_share, llm.identity("judge")]
    manifest = runtime.run_stage(
        Scorecard,
        "scoring",
        version=STAGE_VERSION,
        settings=settings,
        inputs=[evaluation.stage_key, subject.stage_key],
        compute=lambda folder: compute_scores(folder, config, evaluation, subject, runtime),
    )
    return finished(manifest, runtime)


def compute_scores(
    folder: StageFolder, config: ScoringConfig, evaluation: Evaluation, subject: SubjectSet, runtime: Runtime
) -> Scorecard:
    """Ask the judge about every subject sample and write the manifest."""
    from tasks.scoring.judging import ask_judge, average, to_judgements
    from tasks.scoring.rubric import judge_spec

    ledger, first_row = runtime.llm.ledger, len(runtime.llm.ledger.rows)
    references = [read_verified(runtime.store, image.image) for image in subject.images[: config.num_reference_images]]
    samples = [sample for sample in evaluation.samples if sample.kind == "subject"]
    specs = {
        sample.image.key: judge_spec(
            references=references,
            sample=read_verified(runtime.store, sample.image),
            class_prompt=sample.class_prompt,
        )
        for sample in samples
    }
    answers, failures = ask_judge(specs, config, llm=runtime.llm, folder=folder, on_progress=runtime.show("judge"))
    judgements = to_judgements(samples, answers)
    return folder.finish(
        Scorecard,
        version=STAGE_VERSION,
        cost_usd=ledger.sum_cost(since=first_row),
        counts={
            "judged": len(judgements),
            "failed": len(failures),
            "llm_calls": ledger.count_calls(since=first_row),
        },
        served_model=next((answer.served_model for answer in answers.values()), ""),
        judgements=judgements,
        failed=tuple(f"{key}: {reason}" for key, reason in failures.items()),
        scores=average(judgements),
    )
