"""The scoring stage: the judge's scores, and how reliable they are."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.client.schemas.objects import State

from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Evaluation, Sample
from tasks.manifests.scoring import Agreement, Judgement, Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.scoring.config import ScoringConfig
from tasks.services.llm.config import LlmConfig
from tasks.stage.cache import Stage, StageFolder, read_verified, store_reasoning
from tasks.stage.context import Runtime
from tasks.stage.states import finished

if TYPE_CHECKING:
    from tasks.scoring.judge import JudgeRun
    from tasks.scoring.judge_requests import JudgeContext

STAGE_VERSION = 7


@dataclass(frozen=True)
class ScoringInputs:
    """Everything that scores depend on."""

    config: ScoringConfig
    llm: LlmConfig
    evaluation: Evaluation
    subject: SubjectSet

    def stage(self) -> Stage[Scorecard]:
        """Return the stage with its cache key."""
        from tasks.scoring.rubric import digest_rubric

        rubric = digest_rubric(self.config.evidence)
        judges = [rubric, self.llm.fingerprint("judge"), self.llm.fingerprint("second_judge")]
        labels = hashlib.sha256(Path(self.config.labels).read_bytes()).hexdigest() if self.config.labels else ""
        return Stage(
            "scoring",
            Scorecard,
            STAGE_VERSION,
            settings=[self.config.result_fields(), judges, labels],
            inputs=(self.evaluation.compute_content_digest(), self.subject.compute_content_digest()),
        )

    @property
    def samples(self) -> list[Sample]:
        """The samples that are judged."""
        return [sample for sample in self.evaluation.samples if sample.kind == "subject"]


# No retries by Prefect: llm/retries.py retries each call, and a second layer would multiply the attempts.
@task(name="scoring", persist_result=False)
def score_samples(inputs: ScoringInputs, runtime: Runtime) -> State[Scorecard]:
    """Judge the samples, or return the cached scores."""
    manifest = runtime.run_stage(inputs.stage(), lambda folder: compute_scores(folder, inputs, runtime))
    return finished(manifest, runtime)


def compute_scores(folder: StageFolder, inputs: ScoringInputs, runtime: Runtime) -> Scorecard:
    """Judge the samples, compute scores and reliability, and write the manifest."""
    from tasks.scoring import scores
    from tasks.scoring.judge import grade

    # The ledger spans the run; this stage's rows start here.
    ledger, first_row = runtime.llm.ledger, len(runtime.llm.ledger.rows)
    grading = grade(
        inputs.config, make_context(inputs, runtime), llm=runtime.llm, folder=folder, show=runtime.progress_callback
    )
    given, samples = grading.given, inputs.samples
    judgements = scores.to_judgements(samples, grading.judged, grading.tie_break_grades)
    undecided = scores.to_judgements(samples, grading.judged)  # raters are compared before any tie-break
    return folder.finish(
        Scorecard(
            **folder.head(
                STAGE_VERSION,
                cost_usd=ledger.sum_cost(since=first_row),
                counts={
                    "judged": len(judgements),
                    "failed": len(grading.failures),
                    "tie_breaks": len(grading.tie_breaks),
                    "llm_calls": ledger.count_calls(since=first_row),
                },
            ),
            served_model=", ".join(sorted({answer.served_model for answer in given.values()})),
            judgements=judgements,
            evidence=inputs.config.evidence,
            failed=tuple(f"{name}: {reason}" for name, reason in grading.failures.items()),
            scores=scores.mean_scores(judgements),
            estimates=scores.estimate_scores(samples, judgements),
            reliability=scores.assess_judge(
                samples,
                grading.judged,
                # Each answer against its own profile: tie-breaks come from another one than the first grades.
                is_comparable=all(runtime.llm.is_comparable(answer) for answer in given.values()),
                measured=inputs.evaluation.sample_metrics,
                others=compare_others(inputs, grading, undecided, runtime=runtime),
            ),
            pairs=scores.count_pairs(grading.judged),
            checkpoints=scores.rank_checkpoints(grading.judged, published_step=inputs.evaluation.published_step),
            reasoning=store_reasoning(folder, grading.reasoning()),
        )
    )


def make_context(inputs: ScoringInputs, runtime: Runtime) -> "JudgeContext":
    """Return the inputs of the judge's requests, with images shrunk to `max_side`."""
    from tasks.images import shrink_png
    from tasks.scoring.judge_requests import JudgeContext

    config, evaluation, subject = inputs.config, inputs.evaluation, inputs.subject

    def read(ref: ObjectRef) -> bytes:
        return shrink_png(read_verified(runtime.store, ref), max_side=config.max_side)

    return JudgeContext(
        class_noun=subject.class_noun,
        references=[read(image.image) for image in subject.images[: config.num_reference_images]],
        samples=inputs.samples,
        others=[sample for sample in evaluation.samples if sample.kind == "class" and sample.side == "base"],
        candidates=[sample for sample in evaluation.samples if sample.kind == "candidate"],
        published_step=evaluation.published_step,
        evidence=config.evidence,
        read=lambda sample: read(sample.image),
    )


def compare_others(
    inputs: ScoringInputs, grading: "JudgeRun", judgements: Sequence[Judgement], *, runtime: Runtime
) -> tuple[Agreement, ...]:
    """Return the agreement of second judge and human labels with the judge, where configured."""
    from tasks.scoring import scores

    raters: list[tuple[str, Mapping[str, Mapping[str, int]]]] = []
    if grading.second_grades:
        raters.append((runtime.llm.config.fallback_chain("second_judge")[0], grading.second_grades))
    if inputs.config.labels:
        raters.append(("a person", scores.read_labels(Path(inputs.config.labels), inputs.samples)))
    found = [scores.compare_raters(name, grades, judgements) for name, grades in raters]
    return tuple(agreement for agreement in found if agreement is not None)
