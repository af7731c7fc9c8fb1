"""Generate evaluation samples with the same prompts and seeds from base and tuned model."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.sampling.job import IndexedImage, SamplingJob
from tasks.diffusion.types import SamplingRequest
from tasks.errors import ArtifactCorrupt, ServiceUnavailable
from tasks.evaluation.config import EvaluationConfig
from tasks.images import encode_png
from tasks.manifests.base import ObjectRef, Record
from tasks.manifests.evaluation import Sample, SampleKind, Side
from tasks.prompts import write_plain_prompt, write_subject_prompt
from tasks.services.store.base import Store
from tasks.stage.cache import PREFIXES, VERIFIED_AT_ONCE, StageFolder, read_verified
from tasks.stage.digests import digest, dump_signed, load_signed

Source = Side | int
"""Base or published weights, or the retained weights of a step."""
Draw = Callable[[Source, list[SamplingRequest]], Generator[IndexedImage, None, None]]
"""Maps weights and requests to the requests' positions and images, in any order."""


BASE_SAMPLES = "base-samples"
"""Prefix of the store for where samples of base models lie."""


class BaseSample(Record):
    """Where an evaluation stored a sample of a base model."""

    name: str
    image: ObjectRef


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
    negative_prompt: str = ""

    @property
    def request(self) -> SamplingRequest:
        """What the model is asked for."""
        return SamplingRequest(prompt=self.prompt, seed=self.seed, negative_prompt=self.negative_prompt)

    @property
    def source(self) -> "Source":
        """The weights that generate it: a side, or a retained step."""
        return self.side if self.step is None else self.step


@dataclass
class BaseSamples:
    """Samples of a base model by content: those that an evaluation has drawn are taken by later ones of the store.

    An evaluation keeps copies, so that its folder is complete; a sample that was removed or damaged is drawn again.
    """

    folder: StageFolder
    identity: object
    """JSON values: the base model's digest, and all else that its samples depend on but prompts and seed."""
    taken: set[str] = field(default_factory=set)
    """Names of the samples that other evaluations drew."""

    def take(self, planned: Sequence[PlannedSample]) -> None:
        """Copy the samples that are there into the folder, where `generate_samples` finds them."""
        wanted = [plan for plan in planned if plan.source == "base"]
        with ThreadPoolExecutor(VERIFIED_AT_ONCE) as pool:  # each is several requests to a bucket
            self.taken.update(filter(None, pool.map(self.take_one, wanted)))

    def take_one(self, plan: PlannedSample) -> str | None:
        """Copy one sample, unless an earlier attempt has it; return its name if another evaluation drew it."""
        if self.folder.reuse(plan.name) is not None:
            return None
        image = read_note(self.folder.store, self.name_note(plan))
        try:
            data = read_verified(self.folder.store, image) if image is not None else None
        except ArtifactCorrupt:
            return None
        if data is None:
            return None
        self.folder.put_resumable(plan.name, data)
        return plan.name

    def share(self, planned: Sequence[PlannedSample], samples: Sequence[Sample]) -> None:
        """Note where the samples lie that this evaluation drew; one that can't be noted is drawn again by others."""
        for plan, sample in zip(planned, samples, strict=True):
            if plan.source == "base" and plan.name not in self.taken:
                name = self.name_note(plan)
                with contextlib.suppress(ServiceUnavailable):
                    self.folder.store.put_bytes(name, dump_signed(BaseSample(name=name, image=sample.image)))

    def name_note(self, plan: PlannedSample) -> str:
        """Return the key of a sample's note."""
        own = [plan.prompt, plan.seed, plan.negative_prompt]
        return f"{BASE_SAMPLES}/{digest([self.identity, own])[:32]}.json"


def read_note(store: Store, name: str) -> ObjectRef | None:
    """Return the picture that a note is of; None where there is no note, or it is damaged or another's."""
    data = store.find_bytes(name)
    try:
        found = load_signed(BaseSample, data) if data is not None else None
    except ArtifactCorrupt:
        return None
    if found is None or found.name != name or not found.image.key.startswith(f"{PREFIXES['evaluation']}/"):
        return None
    return found.image


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
    return [replace(plan, negative_prompt=config.negative_prompt) for plan in planned]


def generate_samples(
    folder: StageFolder,
    planned: Sequence[PlannedSample],
    *,
    draw: Draw,
    on_progress: Callable[[int, int], None],
) -> tuple[Sample, ...]:
    """Return all samples in planned order; only those that the folder lacks are generated."""
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
        with closing(draw(source, [plan.request for plan in missing])) as drawn:
            for position, picture in drawn:
                plan = missing[position]
                # Reusable by the next attempt even where this one fails before its manifest.
                facts = {"Title": plan.prompt, "Comment": f"seed {plan.seed}"}
                ref = folder.put_resumable(plan.name, encode_png(picture, is_generated=True, facts=facts))
                done[plan.name] = to_sample(plan, ref)
                on_progress(len(done), len(planned))
    return tuple(done[plan.name] for plan in planned)


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
