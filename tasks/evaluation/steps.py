"""The evaluation stage: samples of base and tuned model, and their metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect import task
from prefect.client.schemas.objects import State

from tasks import diffusion as diffusion_code
from tasks import encoders as encoders_code
from tasks.diffusion.config import DiffusionConfig
from tasks.encoders.folders import find_lpips, identify_encoders
from tasks.evaluation.config import EvaluationConfig
from tasks.manifests.evaluation import Evaluation, Sample, Side, SubjectMetrics
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel
from tasks.prompts import write_class_prompt
from tasks.stage.cache import Stage, StageFolder, fetch_folder, read_verified
from tasks.stage.context import Runtime
from tasks.stage.states import finished

if TYPE_CHECKING:
    from PIL.Image import Image

    from tasks.diffusion.adapter import DiffusionModel
    from tasks.evaluation.metrics import Features, Measured
    from tasks.evaluation.sampling import Source

STAGE_VERSION = 3
CLASS_PROMPT = "a photo of {article} {class_noun}"
SIDES: tuple[Side, ...] = ("base", "tuned")


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation depends on."""

    config: EvaluationConfig
    diffusion: DiffusionConfig
    tuned: TunedModel
    subject: SubjectSet

    def stage(self) -> Stage[Evaluation]:
        """Return the stage with its cache key."""
        # The base model itself is covered by the digest of the tuned one.
        sampling = self.diffusion.model_dump(mode="json", include={"family", "resolution", "sampler", "precision"})
        return Stage(
            "evaluation",
            Evaluation,
            STAGE_VERSION,
            settings=[
                diffusion_code.VERSION,
                encoders_code.VERSION,
                # Each sample has its own seed, so it doesn't depend on its batch.
                self.config.model_dump(mode="json", exclude={"batch_size"}),
                sampling,
                identify_encoders(self.config.encoders),
            ],
            inputs=(self.tuned.compute_content_digest(), self.subject.compute_content_digest()),
        )


@task(name="evaluation", persist_result=False)
def evaluate(inputs: EvaluationInputs, runtime: Runtime) -> State[Evaluation]:
    """Generate samples and compute metrics, or return the cached evaluation."""
    manifest = runtime.run_stage(inputs.stage(), lambda folder: compute_evaluation(folder, inputs, runtime))
    return finished(manifest, runtime)


def compute_evaluation(folder: StageFolder, inputs: EvaluationInputs, runtime: Runtime) -> Evaluation:
    """Generate samples of both sides and of retained steps, compute metrics, and write the manifest."""
    from tasks.diffusion.adapter import release_memory
    from tasks.diffusion.registry import load_model
    from tasks.evaluation.sampling import generate_samples, plan_samples

    config, diffusion, tuned, subject = inputs.config, inputs.diffusion, inputs.tuned, inputs.subject
    candidates = tuned.find_candidates()

    def load_source(source: "Source") -> "DiffusionModel":
        if source == "base":
            return load_model(diffusion)
        # The part of an object key that precedes the paths within the model folder.
        refs, below = tuned.model, "model"
        if isinstance(source, int):
            refs, below = tuple(candidates[source]), f"candidates/step-{source:08d}"
        local = runtime.work_folder / "models" / tuned.stage_key / below
        return load_model(diffusion, folder=fetch_folder(runtime.store, refs, below=below, folder=local))

    planned = plan_samples(
        config,
        class_noun=subject.class_noun,
        identifier_token=subject.identifier_token,
        class_prompt=write_class_prompt(CLASS_PROMPT, class_noun=subject.class_noun),
        candidates=sorted(candidates),
    )
    samples = generate_samples(
        folder, config, planned, load_model=load_source, on_progress=runtime.progress_callback("samples")
    )
    measured, sample_metrics = measure_samples(inputs, samples, runtime)
    release_memory()
    return folder.finish(
        Evaluation(
            **folder.head(STAGE_VERSION, counts={"samples": len(samples)}),
            samples=samples,
            metrics=measured.metrics,
            drift=measured.drift,
            ceiling=measured.ceiling,
            sample_metrics=sample_metrics,
            published_step=tuned.published_step,
        )
    )


def measure_samples(
    inputs: EvaluationInputs, samples: Sequence[Sample], runtime: Runtime
) -> "tuple[Measured, dict[str, SubjectMetrics]]":
    """Return the metrics of both sides, and of each sample by its object key."""
    from tasks.diffusion.device import choose_device
    from tasks.encoders.embeddings import Encoders
    from tasks.evaluation.metrics import extract_features, measure_all, measure_each
    from tasks.images import decode_png

    subject, encoders = inputs.subject, Encoders(inputs.config.encoders, choose_device(inputs.diffusion))

    def encode(rows: list[Sample]) -> "Features":
        pictures = [decode_png(read_verified(runtime.store, row.image)) for row in rows]
        return extract_features(encoders, pictures, [row.class_prompt for row in rows])

    def of(side: Side, kind: str) -> "Features":
        return encode([sample for sample in samples if sample.side == side and sample.kind == kind])

    photos = [decode_png(read_verified(runtime.store, image.image)) for image in subject.images]
    plain = write_class_prompt(CLASS_PROMPT, class_noun=subject.class_noun)
    # The ceiling of CLIP-T compares photos with their captions, or with the class prompt.
    reference = extract_features(encoders, photos, [image.caption or plain for image in subject.images])
    measured = measure_all(
        reference,
        {side: of(side, "subject") for side in SIDES},
        {side: of(side, "class") for side in SIDES},
        div=measure_diversity(inputs, samples, runtime),
    )
    shown = [sample for sample in samples if sample.kind != "class"]
    each = measure_each(encode(shown), reference)
    return measured, {sample.image.key: metrics for sample, metrics in zip(shown, each, strict=True)}


def measure_diversity(inputs: EvaluationInputs, samples: Sequence[Sample], runtime: Runtime) -> dict[Side, float]:
    """Return DIV of both sides; empty without LPIPS weights or with one sample per prompt."""
    from tasks.diffusion.device import choose_device
    from tasks.encoders.lpips import load_lpips, mean_pairwise_distance
    from tasks.evaluation.metrics import measure_div
    from tasks.images import decode_png

    config = inputs.config
    files = find_lpips(config.encoders)
    if files is None or config.num_images_per_prompt < 2:
        if config.encoders.lpips != "none":
            runtime.progress.note("DIV is not measured: it needs LPIPS weights and two samples per prompt; see README")
        return {}
    lpips = load_lpips(files, choose_device(inputs.diffusion))

    def read(sample: Sample) -> "Image":
        return decode_png(read_verified(runtime.store, sample.image))

    found: dict[Side, float] = {}
    for side in SIDES:
        own = [sample for sample in samples if sample.side == side and sample.kind == "subject"]
        # Grouped by prompt.
        prompts = [[s for s in own if s.prompt == prompt] for prompt in dict.fromkeys(s.prompt for s in own)]
        pictures = [[read(sample) for sample in row] for row in prompts]
        found[side] = measure_div(pictures, lambda row: mean_pairwise_distance(lpips, row))
    return found
