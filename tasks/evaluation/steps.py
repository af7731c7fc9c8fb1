"""The evaluation stage: samples of base and tuned model, and what is measured of them."""

from typing import Any

from prefect import task

from tasks import diffusion as diffusion_code
from tasks import encoders as encoders_code
from tasks.diffusion.config import DiffusionConfig
from tasks.encoders.folders import find_lpips, identify_encoders
from tasks.evaluation.config import EvaluationConfig
from tasks.manifests.evaluation import Evaluation, Sample, Side
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel
from tasks.prompts import write_class_prompt
from tasks.stage.cache import StageFolder, fetch_folder, read_verified
from tasks.stage.context import Runtime
from tasks.stage.states import finished

STAGE_VERSION = 3
CLASS_PROMPT = "a photo of {article} {class_noun}"


@task(name="evaluation", persist_result=False)
def evaluate(
    config: EvaluationConfig, diffusion: DiffusionConfig, tuned: TunedModel, subject: SubjectSet, runtime: Runtime
) -> Any:
    """Draw and measure, or take what is stored."""
    sampling = diffusion.model_dump(mode="json", include={"family", "resolution", "sampler", "precision"})
    manifest = runtime.run_stage(
        Evaluation,
        "evaluation",
        version=STAGE_VERSION,
        settings=[
            diffusion_code.VERSION,
            encoders_code.VERSION,
            config.model_dump(mode="json", exclude={"batch_size"}),
            sampling,
            identify_encoders(config.encoders),
        ],
        inputs=[tuned.compute_content_digest(), subject.compute_content_digest()],
        compute=lambda folder: compute_evaluation(folder, config, diffusion, tuned, subject, runtime),
    )
    return finished(manifest, runtime)


def compute_evaluation(
    folder: StageFolder,
    config: EvaluationConfig,
    diffusion: DiffusionConfig,
    tuned: TunedModel,
    subject: SubjectSet,
    runtime: Runtime,
) -> Evaluation:
    """Sample both sides, measure, write the manifest."""
    from tasks.diffusion.adapter import DiffusionModel, release_memory
    from tasks.diffusion.registry import open_model
    from tasks.evaluation.sampling import Source, draw_samples, plan_samples

    candidates = tuned.find_candidates()

    def load_model(source: Source) -> DiffusionModel:
        if source == "base":
            return open_model(diffusion)
        refs, below = tuned.model, "model"
        if isinstance(source, int):
            refs, below = tuple(candidates[source]), f"candidates/step-{source:08d}"
        local = runtime.work_folder / "models" / tuned.stage_key / below
        return open_model(diffusion, folder=fetch_folder(runtime.store, refs, below=below, folder=local))

    planned = plan_samples(
        config,
        class_noun=subject.class_noun,
        identifier_token=subject.identifier_token,
        class_prompt=write_class_prompt(CLASS_PROMPT, class_noun=subject.class_noun),
        candidates=sorted(candidates),
    )
    samples = draw_samples(folder, config, planned, load_model=load_model, on_progress=runtime.show("samples"))
    measured, sample_metrics = measure_samples(config, diffusion, samples, subject, runtime)
    release_memory()
    return folder.finish(
        Evaluation,
        version=STAGE_VERSION,
        counts={"samples": len(samples)},
        samples=samples,
        metrics=measured.metrics,
        drift=measured.drift,
        ceiling=measured.ceiling,
        sample_metrics=sample_metrics,
        published_step=tuned.published_step,
    )


def measure_samples(
    config: EvaluationConfig, diffusion: DiffusionConfig, samples: Any, subject: SubjectSet, runtime: Runtime
) -> Any:
    """Encode photos and samples and compare them."""
    from tasks.diffusion.device import choose_device
    from tasks.encoders.embeddings import Encoders
    from tasks.evaluation.metrics import describe, measure_all, measure_each
    from tasks.images import decode_png

    encoders = Encoders(config.encoders, choose_device(diffusion))

    def encode(rows: list[Sample]) -> Any:
        pictures = [decode_png(read_verified(runtime.store, row.image)) for row in rows]
        return describe(encoders, pictures, [row.class_prompt for row in rows])

    def of(side: Side, kind: str) -> Any:
        return encode([sample for sample in samples if sample.side == side and sample.kind == kind])

    photos = [decode_png(read_verified(runtime.store, image.image)) for image in subject.images]
    plain = write_class_prompt(CLASS_PROMPT, class_noun=subject.class_noun)
    captions = [image.caption or plain for image in subject.images]
    sides: tuple[Side, ...] = ("base", "tuned")
    reference = describe(encoders, photos, captions)
    measured = measure_all(
        reference,
        {side: of(side, "subject") for side in sides},
        {side: of(side, "class") for side in sides},
        div=measure_diversity(config, diffusion, samples, runtime),
    )
    shown = [sample for sample in samples if sample.kind != "class"]
    each = measure_each(encode(shown), reference)
    return measured, {sample.image.key: metrics for sample, metrics in zip(shown, each, strict=True)}


def measure_diversity(
    config: EvaluationConfig, diffusion: DiffusionConfig, samples: Any, runtime: Runtime
) -> dict[Side, float]:
    """Return DIV of both sides; nothing where LPIPS has no weights, or every prompt one sample."""
    from tasks.diffusion.device import choose_device
    from tasks.encoders.lpips import load_lpips, mean_distance_within
    from tasks.evaluation.metrics import measure_div
    from tasks.images import decode_png

    files = find_lpips(config.encoders)
    if files is None or config.num_images_per_prompt < 2:
        if config.encoders.lpips != "none":
            runtime.progress.note("DIV is not measured: it needs LPIPS's weights and two samples a prompt; see README")
        return {}
    lpips = load_lpips(files, choose_device(diffusion))
    found: dict[Side, float] = {}
    for side in ("base", "tuned"):
        own = [sample for sample in samples if sample.side == side and sample.kind == "subject"]
        prompts = [[s for s in own if s.prompt == prompt] for prompt in dict.fromkeys(s.prompt for s in own)]
        pictures = [[decode_png(read_verified(runtime.store, s.image)) for s in row] for row in prompts]
        found[side] = measure_div(pictures, lambda row: mean_distance_within(lpips, row))
    return found
