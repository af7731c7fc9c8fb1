"""The evaluation stage: samples of base and tuned model, and their metrics."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from prefect import task
from prefect.client.schemas.objects import State

from tasks import diffusion as diffusion_code
from tasks import encoders as encoders_code
from tasks.diffusion.config import DiffusionConfig
from tasks.encoders.folders import find_lpips, identify_encoders
from tasks.errors import ConfigError
from tasks.evaluation.config import EvaluationConfig
from tasks.evaluation.own_metrics import identify_own_metrics
from tasks.evaluation.prompt_sets import identify_prompts
from tasks.manifests.evaluation import Evaluation, PromptSet, Protocol, Sample, Side
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel, find_below
from tasks.prompts import write_class_prompt
from tasks.stage.cache import Stage, StageFolder, fetch_folder, read_verified
from tasks.stage.context import Runtime
from tasks.stage.digests import digest
from tasks.stage.states import finished

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tasks.diffusion.sampling.devices import Devices
    from tasks.diffusion.sampling.job import IndexedImage
    from tasks.diffusion.types import SamplingRequest
    from tasks.evaluation.measurement import Measured
    from tasks.evaluation.sampling import Source

STAGE_VERSION = 9
SAMPLING = ("num_inference_steps", "guidance_scale", "negative_prompt", "guidance_rescale", "lora_scale")
RESULT_RELEVANT = {"family", "resolution", "sampler", "precision"}
"""Of the model's settings."""
CLASS_PROMPT = "a photo of {article} {class_noun}"


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation depends on."""

    config: EvaluationConfig
    diffusion: DiffusionConfig
    tuned: TunedModel
    subject: SubjectSet

    def stage(self) -> Stage[Evaluation]:
        """Return the stage with its cache key."""
        return Stage(
            "evaluation",
            Evaluation,
            STAGE_VERSION,
            settings=[
                diffusion_code.VERSION,
                encoders_code.VERSION,
                # Each sample has its own seed, so it doesn't depend on its batch; the prompts are resolved already.
                self.config.model_dump(mode="json", exclude={"batch_size", "subject_kind", "num_devices"}),
                # The base model itself is covered by the digest of the tuned one.
                self.diffusion.model_dump(mode="json", include=RESULT_RELEVANT),
                identify_encoders(self.config.encoders),
                identify_own_metrics(),
                shipped.show() if (shipped := self.find_prompt_set()) else "",
            ],
            inputs=(self.tuned.compute_content_digest(), self.subject.compute_content_digest()),
        )

    def find_prompt_set(self) -> PromptSet | None:
        """Return the shipped set that the prompts are; None where they are others."""
        rows = [prompt.model_dump() for prompt in self.config.prompts]
        return identify_prompts(rows, class_noun=self.subject.class_noun, subject_kind=self.config.subject_kind)

    def identify_base(self) -> list[object]:
        """Return what samples of the base model depend on, beside prompts and seed.

        Device and versions too: the tuned model's samples, which they are compared with, are drawn here and now.
        """
        from tasks.diffusion.device import describe_device

        return [
            STAGE_VERSION,
            diffusion_code.VERSION,
            [describe_device(self.diffusion), *map(version, ("torch", "diffusers", "transformers"))],
            self.tuned.base_model.sha256,
            self.diffusion.model_dump(mode="json", include=RESULT_RELEVANT),
            self.config.model_dump(mode="json", include={*SAMPLING} - {"lora_scale", "negative_prompt"}),
        ]


@task(name="evaluation", persist_result=False)
def evaluate(inputs: EvaluationInputs, runtime: Runtime) -> State[Evaluation]:
    """Generate samples and compute metrics, or return the cached evaluation."""
    manifest = runtime.run_stage(inputs.stage(), lambda folder: compute_evaluation(folder, inputs, runtime))
    return finished(manifest, runtime)


def compute_evaluation(folder: StageFolder, inputs: EvaluationInputs, runtime: Runtime) -> Evaluation:
    """Generate samples of both sides and of retained steps, compute metrics, and write the manifest."""
    from tasks.diffusion.device import describe_device, describe_machine
    from tasks.diffusion.sampling.devices import hold
    from tasks.evaluation.sampling import BaseSamples, generate_samples, plan_samples

    config, diffusion, tuned, subject = inputs.config, inputs.diffusion, inputs.tuned, inputs.subject
    planned = plan_samples(
        config,
        class_noun=subject.class_noun,
        identifier_token=subject.identifier_token,
        class_prompt=write_class_prompt(CLASS_PROMPT, class_noun=subject.class_noun),
        candidates=sorted(tuned.find_candidates()),
    )
    devices = find_sampling_devices(inputs)
    shared = BaseSamples(folder, inputs.identify_base())
    shared.take(planned)
    # Held throughout: between two models, a training of another run could take them for hours.
    with hold(devices, diffusion, on_wait=runtime.wait_note("evaluation")):
        samples = generate_samples(
            folder,
            planned,
            draw=lambda source, requests: draw_samples(inputs, source, requests, runtime=runtime),
            on_progress=runtime.progress_callback("samples"),
        )
        shared.share(planned, samples)
        samples, dropped = drop_unsafe(folder, inputs, samples)
        measured = measure_samples(inputs, samples, runtime)
    counts = {"samples": len(samples), **({"dropped": sum(dropped.values())} if dropped else {})}
    counts |= {"shared": len(shared.taken)} if shared.taken else {}
    counts |= devices.counts()
    return folder.finish(
        Evaluation(
            **folder.head(STAGE_VERSION, counts=counts),
            samples=samples,
            dropped=dropped,
            published_step=tuned.published_step,
            prompt_set=inputs.find_prompt_set(),
            protocol=describe_protocol(config, diffusion),
            machine=describe_machine(describe_device(diffusion), num_devices=devices.num),
            **vars(measured),
        )
    )


def draw_samples(
    inputs: EvaluationInputs, source: "Source", requests: "list[SamplingRequest]", *, runtime: Runtime
) -> "Generator[IndexedImage, None, None]":
    """Yield the samples of the base model, the published weights, or those of a retained step."""
    from tasks.diffusion.sampling.devices import sample
    from tasks.evaluation.sampling import plan_job

    weights = fetch_weights(inputs.tuned, source, runtime=runtime)
    job = plan_job(inputs.diffusion, inputs.config, requests, weights=weights)
    return sample(job, find_sampling_devices(inputs))


def find_sampling_devices(inputs: EvaluationInputs) -> "Devices":
    """Return the devices that samples are drawn on."""
    from tasks.diffusion.sampling.devices import find_devices

    return find_devices("evaluation.num_devices", inputs.config.num_devices, diffusion=inputs.diffusion)


def fetch_weights(tuned: TunedModel, source: "Source", *, runtime: Runtime) -> str | None:
    """Return the local folder of weights; None for the base model."""
    if source == "base":
        return None
    refs = tuple(tuned.find_candidates()[source]) if isinstance(source, int) else tuned.model
    below = find_below(refs)
    local = runtime.work_folder / "models" / tuned.stage_key / below
    return str(fetch_folder(runtime.store, refs, below=below, folder=local))


def drop_unsafe(
    folder: StageFolder, inputs: EvaluationInputs, samples: tuple[Sample, ...]
) -> tuple[tuple[Sample, ...], dict[Side, int]]:
    """Remove samples that the base model's safety checker refuses; return the others, and how many by side.

    Raises:
        ConfigError: too few are left to measure.

    """
    from tasks.diffusion.device import choose_device
    from tasks.encoders.safety import OFF, SafetyChecker, find_safety_checker
    from tasks.images import decode_png

    files = find_safety_checker(inputs.config.safety_checker, inputs.diffusion)
    if files is None:
        return samples, {}
    checker = SafetyChecker(files, choose_device(inputs.diffusion))
    pictures = [decode_png(read_verified(folder.store, sample.image)) for sample in samples]
    kept: list[Sample] = []
    dropped: dict[Side, int] = {"base": 0, "tuned": 0}
    for sample, is_unsafe in zip(samples, checker.find_unsafe(pictures), strict=True):
        if is_unsafe:
            folder.discard(sample.image)
            dropped[sample.side] += 1
        else:
            kept.append(sample)
    for side, refused in dropped.items():
        for kind, least in (("subject", 1), ("class", 2)):
            num = sum(sample.side == side and sample.kind == kind for sample in kept)
            if num < least:
                raise ConfigError(
                    f"the safety checker refused {refused} samples of the {side} model: {num} {kind} samples are "
                    f"left, too few to measure; use other prompts or seeds, or {OFF}"
                )
    return tuple(kept), dropped


def describe_protocol(config: EvaluationConfig, diffusion: DiffusionConfig) -> Protocol:
    """Return the encoders and sampling settings, which runs must share to be compared."""
    encoders = config.encoders.model_dump(exclude={"lpips"})
    for name, own in zip(("clip", "dino"), identify_encoders(config.encoders), strict=False):
        if own:  # a folder, by its content wherever it lies
            encoders |= {name: own, f"{name}_revision": None}
    sampling = {name: getattr(config, name) for name in SAMPLING}
    sampling |= {"sampler": diffusion.sampler, "resolution": diffusion.resolution}
    return Protocol(
        encoders=digest([encoders_code.VERSION, encoders]), sampling={name: str(own) for name, own in sampling.items()}
    )


def measure_samples(inputs: EvaluationInputs, samples: Sequence[Sample], runtime: Runtime) -> "Measured":
    """Return every metric of the samples, with intervals."""
    from tasks.diffusion.device import choose_device
    from tasks.encoders.embeddings import Encoders
    from tasks.evaluation.measurement import Registry, measure_all
    from tasks.evaluation.metrics import extract_features
    from tasks.evaluation.own_metrics import load_own_metrics
    from tasks.images import decode_png

    subject, encoders = inputs.subject, Encoders(inputs.config.encoders, choose_device(inputs.diffusion))
    photos = [decode_png(read_verified(runtime.store, image.image)) for image in subject.images]
    plain = write_class_prompt(CLASS_PROMPT, class_noun=subject.class_noun)
    # The ceiling of CLIP-T compares photos with their captions, or with the class prompt.
    reference = extract_features(encoders, photos, [image.caption or plain for image in subject.images])
    pictures = [decode_png(read_verified(runtime.store, sample.image)) for sample in samples]
    features = extract_features(encoders, pictures, [sample.class_prompt for sample in samples])
    features = replace(features, distances=find_distances(inputs, runtime))
    return measure_all(samples, features, reference, registry=Registry().extended(load_own_metrics()))


def find_distances(inputs: EvaluationInputs, runtime: Runtime) -> "Callable[[Sequence[Image]], Tensor] | None":
    """Return LPIPS's distances of images, or None without its weights or with one sample per prompt."""
    config = inputs.config
    files = find_lpips(config.encoders)
    if files is None or config.num_images_per_prompt < 2:
        if config.encoders.lpips != "none":
            runtime.progress.note("DIV is not measured: it needs LPIPS weights and two samples per prompt; see README")
        return None
    from tasks.diffusion.device import choose_device
    from tasks.encoders.lpips import load_lpips, pairwise_distances

    return partial(pairwise_distances, load_lpips(files, choose_device(inputs.diffusion)))
