"""Settings of the training stage."""

from typing import Literal

from pydantic import Field

from tasks.settings import Section


class TrainingConfig(Section):
    """How the weights are fine-tuned."""

    max_train_steps: int = Field(800, ge=1, le=1_000_000, description="optimizer steps")
    train_batch_size: int = Field(1, ge=1, le=256, description="instance images per device and step")
    gradient_accumulation_steps: int = Field(1, ge=1, le=1024, description="forwards per optimizer step")
    learning_rate: float = Field(2e-6, gt=0, le=1, description="AdamW learning rate of the denoiser")
    text_encoder_learning_rate: float | None = Field(
        None, gt=0, le=1, description="learning rate of the text encoder; null: as the denoiser's"
    )
    is_text_encoder_trained: bool = Field(True, description="train the text encoder beside the denoiser")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up")
    lr_warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(1e-2, ge=0, le=1, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    prior_loss_weight: float = Field(1.0, ge=0, le=100, description="weight of the class half; 0 needs no class images")
    flip_probability: float = Field(0.0, ge=0, le=1, description="share of mirrored instance images")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over fp32 weights")
    is_deterministic: bool = Field(True, description="deterministic kernels, so that resume is bit-equal")
    checkpoint_every_steps: int = Field(100, ge=1, description="steps between checkpoints")
    num_checkpoints_kept: int = Field(2, ge=2, description="valid checkpoints kept while training")
    log_every_steps: int = Field(10, ge=1, description="steps between log lines")
    num_devices: int = Field(1, ge=1, le=64, description="processes, one per device")
    num_threads: int = Field(0, ge=0, description="CPU threads per process; 0: all cores")
    grace_seconds: float = Field(25.0, gt=0, description="time to save after a request to stop")

    def result_fields(self) -> dict[str, object]:
        """Return the fields that change the result: the ones that a stage key covers."""
        unchanged = {
            "checkpoint_every_steps", "num_checkpoints_kept", "log_every_steps",
            "num_threads", "grace_seconds",
        }  # fmt: skip
        return self.model_dump(mode="json", exclude=unchanged)
