"""Generate evaluation samples with the same prompts and seeds from base and tuned model."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.sampling.job import IndexedImage, SamplingJob
from tasks.diffusion.types import SamplingRequest
from tasks.evaluation.config import EvaluationConfig
from tasks.images import encode_png
from tasks.manifests.evaluation import Sample, SampleKind, Side
from tasks.prompts import write_plain_prompt, write_subject_prompt
from tasks.stage.cache import StageFolder

Source = Side | int
"""Base or published weights, or the retained weights of a step."""
Draw = Callable[[Source, list[SamplingRequest]], Generator[IndexedImage, None, None]]
"""Maps weights and requests to the requests' positions and images, in any order."""


@dataclass(frozen=True)
class PlannedSample:
    """One sample to generate."""

    side: Side
    kind: SampleKind
    prompt: str
    class_prompt: str
    seed: int
    name: str
    template: str = ""
    prompt_kind: str = ""
    step: int | None = None

    @property
    def source(self) -> "Source":
        """The weights that generate it: a side, or a retained step."""
        return self.side if self.step is None else self.step


def plan_samples(
    config: EvaluationConfig,
    *,
    class_noun: str,
    identifier_token: str,
    class_prompt: str,
    candidates: Sequence[int] = (),
) -> list[PlannedSample]:
    """Return all samples of an evaluation: subject and class samples per side, then those of retained steps."""
    planned = []
    sides: tuple[Side, ...] = ("base", "tuned")
    for side in sides:
        for row, own in enumerate(config.prompts):
            prompt = write_subject_prompt(own.text, identifier_token=identifier_token, class_noun=class_noun)
            # CLIP-T compares with the plain prompt: CLIP doesn't know the identifier token.
            plain = write_plain_prompt(own.text, class_noun=class_noun)
            for i in range(config.num_images_per_prompt):
                name = f"{side}/subject-{row:02d}-{i:02d}.png"
                sample = PlannedSample(side, "subject", prompt, plain, config.seed + i, name)
                planned.append(replace(sample, template=own.text, prompt_kind=own.kind))
        for i in range(config.num_class_images):
            name = f"{side}/class-{i:03d}.png"
            # Without the identifier token: these samples measure prior drift.
            planned.append(PlannedSample(side, "class", class_prompt, class_prompt, config.seed + i, name))
    published = [plan for plan in planned if plan.side == "tuned" and plan.kind == "subject"]
    by_seed = sorted(published, key=lambda plan: plan.seed)  # each prompt once before any is repeated
    for step in candidates:
        for plan in by_seed[: config.num_candidate_images]:
            name = plan.name.replace("tuned/subject", f"candidate-{step:08d}/subject")
            planned.append(replace(plan, kind="candidate", name=name, step=step))
    return planned


def generate_samples(
    folder: StageFolder,
    config: EvaluationConfig,
    planned: Sequence[PlannedSample],
    *,
    draw: Draw,
    on_progress: Callable[[int, int], None],
) -> tuple[Sample, ...]:
    """Return all samples in planned order; only those that no earlier attempt stored are generated."""
    done: dict[str, Sample] = {}
    for plan in planned:
        ref = folder.reuse(plan.name)
        if ref is not None:
            done[plan.name] = to_sample(plan, ref)
    on_progress(len(done), len(planned))
    # Grouped by weights, so that each model is loaded once, and only if a sample of it is missing.
    for source in dict.fromkeys(plan.source for plan in planned):
        missing = [plan for plan in planned if plan.source == source and plan.name not in done]
        if not missing:
            continue
        # Closed also after an error: it may hold processes that sample.
        with closing(draw(source, [to_request(plan, config) for plan in missing])) as drawn:
            for position, picture in drawn:
                plan = missing[position]
                # Reusable by the next attempt even where this one fails before its manifest.
                facts = {"Title": plan.prompt, "Comment": f"seed {plan.seed}"}
                ref = folder.put_resumable(plan.name, encode_png(picture, is_generated=True, facts=facts))
                done[plan.name] = to_sample(plan, ref)
                on_progress(len(done), len(planned))
    return tuple(done[plan.name] for plan in planned)


def to_request(plan: PlannedSample, config: EvaluationConfig) -> SamplingRequest:
    """Return the request of one sample."""
    return SamplingRequest(prompt=plan.prompt, seed=plan.seed, negative_prompt=config.negative_prompt)


def plan_job(
    diffusion: DiffusionConfig, config: EvaluationConfig, requests: Sequence[SamplingRequest], *, weights: str | None
) -> SamplingJob:
    """Return the job of some samples; `weights` None means the base model's."""
    return SamplingJob(
        diffusion=diffusion,
        weights=weights,
        lora_scale=config.lora_scale,
        requests=tuple(requests),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        batch_size=config.batch_size,
    )


def to_sample(plan: PlannedSample, ref: object) -> Sample:
    """Combine a planned sample with its stored image."""
    return Sample.model_validate(
        {
            "image": ref,
            "side": plan.side,
            "kind": plan.kind,
            "prompt": plan.prompt,
            "class_prompt": plan.class_prompt,
            "seed": plan.seed,
            "template": plan.template,
            "prompt_kind": plan.prompt_kind,
            "step": plan.step,
        }
    )
