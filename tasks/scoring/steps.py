"""The scoring stage: the judge's grades, and how far they can be trusted."""

import hashlib
from pathlib import Path
from typing import Any

from prefect import task

from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.scoring import Agreement, Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.scoring.config import ScoringConfig
from tasks.services.llm.config import LlmConfig
from tasks.stage.cache import StageFolder, read_verified, store_reasoning
from tasks.stage.context import Runtime
from tasks.stage.states import finished

STAGE_VERSION = 3


@task(name="scoring", persist_result=False)
def score_samples(
    config: ScoringConfig, llm: LlmConfig, evaluation: Evaluation, subject: SubjectSet, runtime: Runtime
) -> Any:
    """Have the samples graded, or take the stored grades."""
    from tasks.scoring.rubric import digest_rubric

    judges = [digest_rubric(), llm.identity("judge"), llm.identity("second_judge")]
    labels = hashlib.sha256(Path(config.labels).read_bytes()).hexdigest() if config.labels else ""
    manifest = runtime.run_stage(
        Scorecard,
        "scoring",
        version=STAGE_VERSION,
        settings=[config.result_fields(), judges, labels],
        inputs=[evaluation.compute_content_digest(), subject.compute_content_digest()],
        compute=lambda folder: compute_scores(folder, config, evaluation, subject, runtime),
    )
    return finished(manifest, runtime)


def compute_scores(
    folder: StageFolder, config: ScoringConfig, evaluation: Evaluation, subject: SubjectSet, runtime: Runtime
) -> Scorecard:
    """Put all questions to the judge and write the manifest."""
    from tasks.images import shrink_png
    from tasks.scoring import scores
    from tasks.scoring.judge import grade
    from tasks.scoring.judge_requests import JudgeContext

    ledger, first_row = runtime.llm.ledger, len(runtime.llm.ledger.rows)
    samples = [sample for sample in evaluation.samples if sample.kind == "subject"]

    def read(ref: ObjectRef) -> bytes:
        return shrink_png(read_verified(runtime.store, ref), max_side=config.max_side)

    material = JudgeContext(
        class_noun=subject.class_noun,
        references=[read(image.image) for image in subject.images[: config.num_reference_images]],
        samples=samples,
        others=[sample for sample in evaluation.samples if sample.kind == "class" and sample.side == "base"],
        candidates=[sample for sample in evaluation.samples if sample.kind == "candidate"],
        published_step=evaluation.published_step,
        read=lambda sample: read(sample.image),
    )
    grading = grade(config, material, llm=runtime.llm, folder=folder, show=runtime.show)
    questions, answers = grading.questions, grading.answers
    judgements = scores.to_judgements(samples, questions, answers, grading.decided)
    plain = scores.to_judgements(samples, questions, answers)  # raters agree or not before anything is settled
    return folder.finish(
        Scorecard,
        version=STAGE_VERSION,
        cost_usd=ledger.sum_cost(since=first_row),
        counts={
            "judged": len(judgements),
            "failed": len(grading.failures),
            "settled": len(grading.settled),
            "llm_calls": ledger.count_calls(since=first_row),
        },
        served_model=", ".join(sorted({answer.served_model for answer in grading.given.values()})),
        judgements=judgements,
        failed=tuple(f"{name}: {reason}" for name, reason in grading.failures.items()),
        scores=scores.average(judgements),
        intervals=scores.find_intervals(judgements),
        health=scores.examine_judge(
            samples,
            questions,
            answers,
            is_comparable=all(runtime.llm.is_comparable(answer) for answer in grading.given.values()),
            measured=evaluation.sample_metrics,
            others=compare_others(config, grading.second_grades, plain, samples, runtime),
        ),
        pairs=scores.count_pairs(questions, answers),
        checkpoints=scores.rank_checkpoints(questions, answers, published_step=evaluation.published_step),
        reasoning=store_reasoning(folder, grading.reasoning()),
    )


def compare_others(
    config: ScoringConfig, second: Any, judgements: Any, samples: Any, runtime: Runtime
) -> tuple[Agreement, ...]:
    """Return how a second judge and a person agree with the first, where there are such."""
    from tasks.scoring import scores

    found: list[Agreement | None] = []
    if second:
        found.append(scores.compare_raters(runtime.llm.config.fallback_chain("second_judge")[0], second, judgements))
    if config.labels:
        labels = scores.read_labels(Path(config.labels), samples)
        found.append(scores.compare_raters("a person", labels, judgements))
    return tuple(agreement for agreement in found if agreement is not None)
