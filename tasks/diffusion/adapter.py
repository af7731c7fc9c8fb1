"""The base class of all model families: VAE, tokenization, sampling through a pipeline, saving."""

import gc
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.device import choose_device
from tasks.diffusion.loading import load_components, load_scheduler
from tasks.diffusion.lora.kohya import OriginalLayer
from tasks.diffusion.noise_schedulers import GaussianDiffusion, NoiseProcess, RectifiedFlow, make_sampler
from tasks.diffusion.textual_inversion import (
    LearnedEmbedding,
    add_placeholder_tokens,
    placeholder_tokens,
    write_prompt,
)
from tasks.diffusion.types import Conditioning, OnStep, Posterior, SamplingRequest
from tasks.errors import ConfigError
from tasks.prompts import truncate_prompt

DECODED_PIXELS = 8 * 512**2  # at a time: the VAE's activations are large
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffusionModel(ABC):
    """A loaded model on its device: the contract of every model family.

    A family is one subclass in `families/`: prompt encoding, the denoiser's call, the layers that LoRA adapts.
    Shapes: B images, C latent channels, h = H/8, w = W/8 (mini: H/4, W/4), L tokens, D channels of the text states.
    """

    pipeline_class: ClassVar[str]
    denoiser_name: ClassVar[str]
    denoiser_class: ClassVar[str]
    noise_class: ClassVar[type[GaussianDiffusion] | type[RectifiedFlow]]
    text_encoder_names: ClassVar[tuple[str, ...]]
    is_any_encoder_optional: ClassVar[bool] = False
    unused_components: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    """Components of the pipeline's index that are not loaded."""
    has_unused_parameters: ClassVar[bool] = True
    """Whether layers get no gradient, as the last of a text encoder whose states are read before it."""
    max_lengths: ClassVar[dict[str, int]] = {}
    """Token limits of tokenizers that name none that suits the family."""
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]
    """Names of the layers that LoRA adapts, by component."""
    original_layers: ClassVar[tuple[OriginalLayer, ...]] = ()
    """The denoiser's layers in the original checkpoint, where they aren't diffusers' own."""
    index_settings: ClassVar[tuple[str, ...]] = ()
    """Settings beside the components in the pipeline's index that change what is computed."""
    fixed_settings: ClassVar[dict[str, Any]] = {}
    """Pipeline settings with a fixed value."""
    implementation: ClassVar[str] = "diffusers"
    """The code that defines the model, as ModelSpec names it."""

    def __init__(
        self,
        components: dict[str, Any],
        noise: NoiseProcess,
        config: DiffusionConfig,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.noise_scheduler = noise
        self.device = device or choose_device(config)
        self.components = components
        self.settings: dict[str, Any] = dict(self.fixed_settings)
        self.identifier_token = ""
        self.learned: dict[str, LearnedEmbedding] = {}
        self.placeholders: dict[str, list[str]] = {}
        for component in components.values():
            if isinstance(component, nn.Module):
                # `eval` disables dropout; training switches on exactly what its method trains.
                component.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path, config: DiffusionConfig, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load a diffusers folder; `dtype` applies to all weights but the VAE's.

        Raises:
            ConfigError: a component is missing, or the folder is not a safe diffusers folder.

        """
        texts = tuple(component for name in cls.text_encoder_names for component in (name, tokenizer_of(name)))
        wanted = (cls.denoiser_name, "vae", *(() if cls.is_any_encoder_optional else texts))
        components = load_components(folder, wanted, optional=texts, denoiser_class=cls.denoiser_class, dtype=dtype)
        model = cls(components, cls.load_noise(folder), config)
        index = json.loads((folder / "model_index.json").read_text())
        # The constructor knows the fixed settings; those of this checkpoint come from its index.
        model.settings |= {name: index[name] for name in cls.index_settings if name in index}
        return model

    @classmethod
    def load_noise(cls, folder: Path) -> GaussianDiffusion | RectifiedFlow:
        """Return the noise process of the model's own scheduler configuration."""
        return cls.noise_class(load_scheduler(folder, cls.noise_class.scheduler_class))

    @classmethod
    def index_names(cls) -> list[str]:
        """Return the component names of the family's `model_index.json`, absent optional ones included."""
        encoders = cls.text_encoder_names
        return ["scheduler", "vae", cls.denoiser_name, *encoders, *map(tokenizer_of, encoders), *cls.unused_components]

    @property
    @abstractmethod
    def architecture(self) -> str:
        """ModelSpec's name of the base model."""

    @property
    def vae(self) -> Any:
        """The autoencoder; always frozen."""
        return self.components["vae"]

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return self.components[self.denoiser_name]

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The loaded text encoders by component name, in the order of `text_encoder_names`."""
        return {name: self.components[name] for name in self.text_encoder_names if name in self.components}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each loaded text encoder, by the encoder's name."""
        return {name: self.components[tokenizer_of(name)] for name in self.text_encoders}

    def trainable_modules(self, *, train_text_encoder: bool) -> dict[str, nn.Module]:
        """Return the denoiser and, with `train_text_encoder`, the CLIP text encoders; T5 is never trained."""
        modules: dict[str, nn.Module] = {self.denoiser_name: self.denoiser}
        if train_text_encoder:
            modules |= {n: e for n, e in self.text_encoders.items() if "T5" not in type(e).__name__}
        return modules

    def max_length(self, name: str) -> int:
        """Return a text encoder's context length in tokens, special tokens included."""
        return self.max_lengths.get(name) or int(self.tokenizers[name].model_max_length)

    def truncate_prompts(self, prompt: str) -> dict[str, str]:
        """Return the prompt as each text encoder receives it, cut at a phrase boundary to fit its context."""
        return {name: truncate_prompt(prompt, fits=partial(self.fits_context, name)) for name in self.tokenizers}

    def fits_context(self, name: str, prompt: str) -> bool:
        """Whether a prompt fits a text encoder's context without truncation."""
        # `verbose=False` mutes the tokenizer's warning about long sequences, which is the expected case here.
        tokens = self.tokenizers[name](self.insert_placeholder_tokens([prompt], name)[0], verbose=False).input_ids
        return len(tokens) <= self.max_length(name)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the padded ids of all tokenizers side by side, `(B, L1 + L2 + ...)`, on the CPU.

        One tensor per prompt set makes rows comparable and cacheable; `split_ids` undoes the concatenation.
        """
        given = [self.truncate_prompts(prompt) for prompt in prompts]
        columns = [
            tokenizer(
                self.insert_placeholder_tokens([prompt[name] for prompt in given], name),
                padding="max_length",
                max_length=self.max_length(name),
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for name, tokenizer in self.tokenizers.items()
        ]
        return torch.cat(columns, 1) if columns else torch.zeros(len(prompts), 0, dtype=torch.long)

    def insert_placeholder_tokens(self, prompts: Sequence[str], name: str) -> list[str]:
        """Return prompts with the identifier token replaced by one tokenizer's placeholder tokens."""
        names = self.placeholders.get(name, [])
        return [write_prompt(prompt, self.identifier_token, names) if names else prompt for prompt in prompts]

    def add_placeholder_tokens(self, identifier_token: str, vectors: dict[str, Tensor]) -> dict[str, LearnedEmbedding]:
        """Add placeholder tokens with embeddings `(V, D)` to text encoders; prompts keep the identifier token.

        Raises:
            ConfigError: a placeholder is in the vocabulary already, or vocabulary and embedding table differ in size.

        """
        self.identifier_token = identifier_token
        for name, rows in vectors.items():
            names = placeholder_tokens(identifier_token, len(rows))
            tokenizer = self.tokenizers[name]
            # A saved full model has them merged already; only the replacement in prompts is set up.
            if names[0] not in tokenizer.get_vocab():
                self.learned[name] = add_placeholder_tokens(tokenizer, self.components[name], names, vectors=rows)
            self.placeholders[name] = names
        return self.learned

    @torch.no_grad()
    def merge_token_embeddings(self) -> None:
        """Merge learned vectors into ordinary rows of the embedding tables, so that `from_pretrained` can load them."""
        for name, learned in self.learned.items():
            rows = torch.cat([learned.weight, learned.vectors.to(learned.weight)])
            # `_weight`: no random initialization.
            table = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows).requires_grad_(False)
            self.components[name].set_input_embeddings(table)
            # `from_pretrained` allocates the table by the configuration.
            self.components[name].config.vocab_size = len(rows)
        self.learned = {}

    def split_ids(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Split `(B, L1 + L2 + ...)` into each text encoder's ids, on the device."""
        lengths = [self.max_length(name) for name in self.text_encoders]
        return dict(zip(self.text_encoders, torch.split(input_ids.to(self.device), lengths, 1), strict=True))

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Posterior:
        """Encode pixels `(B, 3, H, W)` in [-1, 1]; return the posterior in the denoiser's scale."""
        posterior = self.vae.encode(pixel_values.to(self.device)).latent_dist
        # `shift_factor` is None for SD 1.x to XL; SD 3 and Flux set it.
        factor, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        # An affine map (z - shift) * factor: the standard deviation only scales.
        return Posterior(mean=(posterior.mean - shift) * factor, std=posterior.std * factor)

    @abstractmethod
    def encode_prompts(self, input_ids: Tensor) -> Conditioning:
        """Return the conditioning of token ids `(B, L1 + L2 + ...)`."""

    @abstractmethod
    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, *, time_ids: Tensor
    ) -> Tensor:
        """Return noise, velocity or flow `(B, C, h, w)`.

        `timesteps` are `(B,)`; `time_ids` `(B, 6)` are read by SDXL alone.
        """

    @torch.no_grad()
    def sample(
        self,
        requests: Sequence[SamplingRequest],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Sample one image per request through diffusers' pipeline.

        Each has its own generator, so an image doesn't depend on its batch. Raises ConfigError where the pipeline
        can't rescale guidance.
        """
        pipeline = self.make_pipeline()
        if guidance_rescale and "guidance_rescale" not in inspect.signature(pipeline.__call__).parameters:
            raise ConfigError(f"{self.pipeline_class} has no guidance_rescale; set evaluation.guidance_rescale=0")
        optional: dict[str, Any] = {"guidance_rescale": guidance_rescale} if guidance_rescale else {}
        if on_step is not None:
            optional["callback_on_step_end"] = report_steps(on_step)
        negative = [request.negative_prompt for request in requests]
        # CPU generators: the same start noise on every device.
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        with self.autocast():
            latents: Tensor = pipeline(
                **self.pipeline_inputs([request.prompt for request in requests], negative),
                **optional,
                generator=generators,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=self.config.resolution,
                width=self.config.resolution,
                output_type="latent",  # `decode` below works in float32 and in chunks
            ).images
        return self.decode(self.unpack_latents(latents))

    def autocast(self) -> torch.autocast:
        """Return the autocast context for denoising: the weights' half-precision dtype, else the configured one.

        Weights in half precision take precedence: normalization layers don't accept mixed dtypes.
        """
        held = {parameter.dtype for parameter in self.denoiser.parameters()} & {torch.bfloat16, torch.float16}
        # At most one half precision: `weight_dtype` applies to all frozen weights.
        dtype = next(iter(held), DTYPES[self.config.precision])
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def unpack_latents(self, latents: Tensor) -> Tensor:
        """Return the pipeline's latents as `(B, C, h, w)`; families with packed latents override this."""
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode scaled latents `(B, C, h, w)` to RGB images.

        Always in float32: activations of SDXL's VAE overflow fp16 (its `force_upcast`).
        """
        factor, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        side = self.config.resolution
        pictures = []
        with torch.autocast(self.device.type, enabled=False):
            # In chunks of bounded area, whatever the batch size of sampling.
            for rows in torch.split(latents.float(), max(1, DECODED_PIXELS // side**2)):
                # Inverts the map of `encode_images`.
                pixels = self.vae.decode(rows / factor + shift, return_dict=False)[0]
                # [-1, 1] -> 0..255, (B, 3, H, W)
                levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
                pictures += [Image.fromarray(row.permute(1, 2, 0).cpu().numpy()) for row in levels]
        return pictures

    def make_pipeline(self) -> Any:
        """Return a pipeline over the loaded components; no weights are copied or reloaded."""
        pipeline_class = getattr(diffusers, self.pipeline_class)
        names = [name for name in self.index_names() if name != "scheduler"]
        # Pipelines accept None for optional components.
        components = {name: self.components.get(name) for name in names}
        pipeline = pipeline_class(scheduler=self.make_sampler(), **components, **self.settings)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def make_sampler(self) -> Any:
        """Return a new scheduler for sampling, on the base model's schedule. Raises ConfigError for another's."""
        return make_sampler(self.config.sampler, self.noise_scheduler)  # type: ignore[arg-type]

    @abstractmethod
    def pipeline_inputs(self, prompts: list[str], negative_prompts: list[str] | None = None) -> dict[str, Any]:
        """Return the prompts as embedding arguments of the pipeline; negative ones are empty unless given.

        Encoded here, not by the pipeline: it knows neither placeholder tokens nor our shortening of long prompts.
        """

    def save(self, folder: Path) -> None:
        """Write a diffusers folder that the family's pipeline loads."""
        # Not through the pipeline class, whose import takes seconds.
        index: dict[str, Any] = {"_class_name": self.pipeline_class, "_diffusers_version": diffusers.__version__}
        # Components that are not loaded, such as a missing T5, stay `[null, null]`, as diffusers writes optional ones.
        index |= {name: [None, None] for name in self.index_names()} | self.settings
        for name, component in {**self.components, "scheduler": self.saved_scheduler()}.items():
            if name.startswith("tokenizer"):
                reset_tokenizer(component)
            component.save_pretrained(folder / name)
            library = "transformers" if name.startswith(("text_encoder", "tokenizer")) else "diffusers"
            index[name] = [library, type(component).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def saved_scheduler(self) -> Any:
        """Return the scheduler to save; by default the sampling one."""
        return self.make_sampler()


def report_steps(on_step: OnStep) -> Callable[..., dict[str, Any]]:
    """Return a pipeline's callback, which changes nothing, for one that takes the steps done and their number."""

    def end_step(pipeline: Any, index: int, *others: Any) -> dict[str, Any]:
        on_step(index + 1, len(pipeline.scheduler.timesteps))
        unchanged: dict[str, Any] = others[-1]  # after the timestep
        return unchanged

    return end_step


def reset_tokenizer(tokenizer: Any) -> None:
    """Reset the padding and truncation of the last call, which `save_pretrained` would write to `tokenizer.json`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()


def release_memory() -> None:
    """Return cached device memory to the driver: the next stage may run in another process."""
    gc.collect()  # first: `empty_cache` returns only blocks that no tensor uses
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tokenizer_of(text_encoder_name: str) -> str:
    """Return the tokenizer's component name: `text_encoder_2` -> `tokenizer_2`."""
    return text_encoder_name.replace("text_encoder", "tokenizer")
