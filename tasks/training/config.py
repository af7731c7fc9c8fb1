"""Settings of the training stage."""

from typing import Literal

from pydantic import Field, model_validator

from tasks.config_base import OperatorText, PlainNames, PlainText, Section, SubjectTemplates


class LoraSettings(Section):
    """Low-rank adapters (arXiv 2106.09685)."""

    learning_rate: float = Field(gt=0, le=1, description="AdamW learning rate of the denoiser's adapters")
    text_encoder_learning_rate: float | None = Field(
        gt=0, le=1, description="learning rate of the text encoder's adapters; null: as the denoiser's"
    )
    rank: int = Field(ge=1, le=512, description="width of the adapters; size and memory grow with it")
    lora_alpha: float = Field(gt=0, le=100_000, description="the update is scaled by lora_alpha / rank")
    lora_dropout: float = Field(ge=0, lt=1, description="dropout before the adapters")
    use_dora: bool = Field(description="decompose into magnitude and direction (DoRA, arXiv 2402.09353); slower")
    target_modules: PlainNames = Field(description="layers of the denoiser; empty: as the family says")
    save_precision: Literal["fp16", "bf16", "fp32"] = Field(
        description="number format of the saved adapter; fp32 doubles the file"
    )


class TextualInversionSettings(Section):
    """A learned token (arXiv 2208.01618)."""

    num_vectors: int = Field(ge=1, le=32, description="embedding vectors of the token")
    learning_rate: float = Field(gt=0, le=1, description="AdamW learning rate of the vectors")
    initializer_token: PlainText = Field(description="words that initialize the embedding; empty: the class noun")
    switch_step: int = Field(
        ge=0,
        le=1_000_000,
        description="textual_inversion+...: the token alone until this step, then the weights alone; 0: both",
    )


class ValidationSettings(Section):
    """A deterministic loss: fixed photos, noise and timesteps; of held-out photos where there are any."""

    validation_steps: int = Field(ge=0, le=1_000_000, description="steps between validations; 0: none")
    keep: Literal["last", "best"] = Field(description="published weights: of the last step, or the best")
    metric: Literal["loss", "similarity"] = Field(
        description="metric that selects the best checkpoint: validation loss, or DINO x CLIP-T of samples"
    )
    num_holdout: int | None = Field(
        ge=0,
        le=1000,
        description="photos held out of training for the loss; null: one in five where keep=best goes by loss and "
        "there are at least 6, else none, and similarity decides",
    )
    save_top_k: int = Field(ge=1, le=20, description="best checkpoints retained, the published one included")
    early_stopping: bool = Field(
        description="stop once the loss has converged (DVAR, arXiv 2302.04841); changes the number of steps"
    )
    window: int = Field(ge=2, le=1000, description="validations in the convergence window")
    threshold: float = Field(gt=0, lt=1, description="converged: variance in the window over that of all validations")
    sample_steps: int = Field(ge=0, le=1_000_000, description="steps between sample grids; 0: none")
    sample_prompts: SubjectTemplates = Field(min_length=1, description="templates of the sample grids")
    sample_num_inference_steps: int = Field(ge=1, le=1000, description="denoising steps of these samples")


class TrainingConfig(Section):
    """How the weights are fine-tuned."""

    method: Literal["full", "lora", "textual_inversion", "textual_inversion+lora", "textual_inversion+full"] = Field(
        description="what is trained: all weights, adapters, a token, or a token and one of these"
    )
    lora: LoraSettings
    textual_inversion: TextualInversionSettings
    validation: ValidationSettings
    train_denoiser: bool = Field(description="train the UNet or transformer")
    max_train_steps: int = Field(ge=1, le=1_000_000, description="optimizer steps")
    train_batch_size: int = Field(ge=1, le=256, description="instance images per device and step")
    gradient_accumulation_steps: int = Field(ge=1, le=1024, description="forwards per optimizer step")
    learning_rate: float = Field(gt=0, le=1, description="AdamW learning rate of the denoiser")
    text_encoder_learning_rate: float | None = Field(
        gt=0, le=1, description="learning rate of the text encoder; null: as the denoiser's"
    )
    train_text_encoder: bool = Field(description="train the text encoder beside the denoiser")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = Field(
        description="adamw8bit: 8-bit optimizer state, approximate; prodigy: finds its own rate, the configured rates "
        "only say how groups compare",
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field(description="learning rate by step, as diffusers' get_scheduler names and computes it")
    lr_warmup_steps: int = Field(
        ge=0, le=1_000_000, description="steps of linear warm-up from 0, before what the schedule says"
    )
    lr_num_cycles: int = Field(ge=1, le=1000, description="cycles of cosine_with_restarts")
    lr_power: float = Field(gt=0, le=10, description="exponent of polynomial")
    weight_decay: float = Field(ge=0, le=1, description="AdamW weight decay")
    max_grad_norm: float = Field(gt=0, le=1e9, description="gradients are clipped to this norm")
    prior_loss_weight: float = Field(ge=0, le=100, description="weight of the class half; 0 needs no class images")
    snr_gamma: float | None = Field(
        gt=0, le=1e6, description="min-SNR weighting of every example (arXiv 2303.09556), usually 5; null: none"
    )
    proportion_empty_prompts: float = Field(
        ge=0, le=1, description="share of instance prompts left empty; keeps guidance working in long runs"
    )
    ema_decay: float = Field(
        ge=0, lt=1, description="EMA decay, 0.999 for long runs, 0: off; costs one copy of the trained weights"
    )
    gradient_checkpointing: bool = Field(
        description="recompute activations backward: much less memory, about a third slower, same mathematics"
    )
    num_crop_variants: int = Field(ge=0, le=64, description="cached random crops per photo; 0: the center crop alone")
    aspect_ratio_bucketing: bool = Field(
        description="train photos at their own aspect ratio, about resolution squared pixels; for SDXL and later"
    )
    background_loss_weight: float = Field(
        ge=0, le=1, description="weight of a cut-out photo's transparent parts in the loss; 1: as the rest"
    )
    flip_probability: float = Field(ge=0, le=1, description="probability of flipping an instance image")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        description="bf16, fp16: autocast over fp32 weights; fp16 scales the loss"
    )
    weight_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        description="number format of frozen weights; half of it fits larger models, and rounds"
    )
    allow_tf32: bool = Field(description="19-bit matrix products for fp32 on recent GPUs; rounds")
    channels_last: bool = Field(description="NHWC memory for UNets, faster on GPUs in half precision; rounds")
    compile: bool = Field(description="compile the denoiser's repeated blocks: a minute at start, then faster; rounds")
    deterministic: bool = Field(description="deterministic kernels, so that resume is bit-equal")
    max_skipped_steps: int = Field(
        ge=0,
        le=1_000_000,
        description="consecutive steps with a non-finite loss or gradient that are skipped before training fails",
    )
    checkpointing_steps: int = Field(ge=1, le=1_000_000, description="steps between checkpoints")
    checkpoints_total_limit: int = Field(ge=2, le=1000, description="valid checkpoints kept while training")
    upload_checkpoints: bool = Field(
        description="upload checkpoints to the store while training, so that another machine can resume"
    )
    log_every_n_steps: int = Field(ge=1, le=1_000_000, description="steps between log lines")
    num_devices: int = Field(ge=0, le=64, description="processes on a machine, one per device; 0: all its GPUs")
    fsdp: bool = Field(description="shard trained parameters over all devices (FSDP), for models that don't fit on one")
    num_nodes: int = Field(ge=1, le=1024, description="machines; above 1 they share output_dir")
    rdzv_endpoint: OperatorText = Field(description="HOST:PORT of the first machine, where there are several")
    num_threads: int = Field(
        ge=0, le=1024, description="CPU threads per process; 0: as OMP_NUM_THREADS says, else all cores"
    )
    stall_seconds: float = Field(
        gt=0,
        le=604_800,
        description="seconds without a forward pass on some rank after which the run fails as stalled",
    )
    grace_seconds: float = Field(gt=0, le=86_400, description="time to save a checkpoint after a request to stop")

    @property
    def world_size(self) -> int:
        """The total number of processes."""
        return self.num_devices * self.num_nodes

    @model_validator(mode="after")
    def check_rendezvous(self) -> "TrainingConfig":
        """Require a rendezvous endpoint for several nodes."""
        if self.num_nodes > 1 and ":" not in self.rdzv_endpoint:
            raise ValueError("num_nodes is above 1: set training.rdzv_endpoint to HOST:PORT of the first machine")
        return self

    @model_validator(mode="after")
    def check_sharding(self) -> "TrainingConfig":
        """Refuse options that sharded training doesn't support."""
        if not self.fsdp:
            return self
        if self.method.startswith("textual_inversion"):
            raise ValueError("fsdp doesn't learn tokens; set training/method=full or lora")
        if self.optimizer != "adamw" or self.mixed_precision == "fp16":
            raise ValueError("fsdp needs optimizer=adamw and mixed_precision no or bf16")
        # Each forward gathers shards collectively, so ranks must run equally many forwards per step.
        if self.aspect_ratio_bucketing and self.train_batch_size > 1:
            raise ValueError("fsdp with aspect_ratio_bucketing needs train_batch_size=1: ranks run in step")
        return self

    @model_validator(mode="after")
    def check_schedule(self) -> "TrainingConfig":
        """Refuse warm-up steps with a schedule that ignores them, as diffusers would silently do."""
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError("lr_scheduler=constant has no warm-up: set lr_scheduler=constant_with_warmup")
        return self

    @model_validator(mode="after")
    def check_precisions(self) -> "TrainingConfig":
        """Require frozen half-precision weights to match the autocast dtype."""
        if self.weight_dtype not in ("fp32", self.mixed_precision):
            raise ValueError(
                f"weight_dtype={self.weight_dtype} needs mixed_precision={self.weight_dtype}, "
                f"not {self.mixed_precision}"
            )
        return self

    def result_fields(self) -> dict[str, object]:
        """Return the fields that affect the result, which the stage's cache key covers."""
        # Saving, logging, time limits and placement leave the weights unchanged.
        unchanged = {
            "checkpointing_steps", "checkpoints_total_limit", "upload_checkpoints", "log_every_n_steps",
            "num_threads", "rdzv_endpoint", "grace_seconds", "stall_seconds", "max_skipped_steps",
        }  # fmt: skip
        # Options without effect on the method are excluded, so that changing them keeps the cached model.
        if not self.method.endswith("lora"):
            unchanged.add("lora")
        if not self.method.startswith("textual_inversion"):
            unchanged.add("textual_inversion")
        if not self.method.endswith("full"):
            unchanged |= {"learning_rate", "text_encoder_learning_rate"}
        return self.model_dump(mode="json", exclude=unchanged)
