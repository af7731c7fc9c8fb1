"""Precomputed memory estimates of the presets, available without importing torch.

`python -m tests.bench.memory_table` recomputes the table; a test compares parts of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.diffusion.config import DiffusionConfig
from tasks.stage.digests import digest
from tasks.training.config import TrainingConfig

TABLE = Path(__file__).parent / "table.json"
TABLE_VERSION = 2  # of the prediction
TABLE_ROWS = 2  # images per forward of the table's activations
OPTIMIZER_STATE_BYTES = {"adamw8bit": 2, "prodigy": 16}  # per trained parameter; else 8, two float32 moments
# Overhead of the allocator and of kernel workspaces: a fraction of the rest, and bytes.
OVERHEAD_FRACTION, OVERHEAD_BYTES = 0.05, 600 * 2**20
GPU_MEMORY_GB = (8, 16, 24, 80)  # GB, as cards are sold
# Settings that are part of a row's key; others scale a row linearly, or don't change memory.
KEY_FIELDS = {
    "lora", "textual_inversion", "train_denoiser", "train_text_encoder", "gradient_checkpointing", "mixed_precision",
    "weight_dtype",
}  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step on one device."""

    weights: int
    gradients: int
    optimizer_state: int
    ema: int
    activations: int
    trainable_parameters: int
    total_parameters: int

    @property
    def total(self) -> int:
        """The sum in bytes, with allocator and workspace overhead."""
        plain = self.weights + self.gradients + self.optimizer_state + self.ema + self.activations
        return int(plain * (1 + OVERHEAD_FRACTION)) + OVERHEAD_BYTES

    def find_smallest_gpu(self) -> int | None:
        """Return the memory of the smallest common GPU that it fits on, in GB; None where it fits on none."""
        return next((card for card in GPU_MEMORY_GB if self.total <= card * 2**30), None)


def count_rows(training: TrainingConfig) -> int:
    """Return the images per forward, instance and class images together."""
    return training.train_batch_size * (2 if training.prior_loss_weight > 0 else 1)


def describe_table_key(diffusion: DiffusionConfig, training: TrainingConfig) -> str:
    """Return the table's key: a digest of all settings whose effect is not a mere scaling."""
    where = [diffusion.family, diffusion.pretrained_model_name_or_path, diffusion.resolution]
    return digest([TABLE_VERSION, where, training.model_dump(mode="json", include=KEY_FIELDS)])[:32]


def look_up(
    diffusion: DiffusionConfig, training: TrainingConfig, methods: Sequence[str]
) -> dict[str, MemoryEstimate] | None:
    """Return the estimates of a preset for any batch size and optimizer; None where it isn't in the table."""
    rows = json.loads(TABLE.read_text()).get(describe_table_key(diffusion, training))
    if rows is None or training.fsdp:
        return None
    return {method: scale(MemoryEstimate(**rows[method]), training) for method in methods}


def scale(found: MemoryEstimate, training: TrainingConfig) -> MemoryEstimate:
    """Adapt a row of the table to the configured optimizer, EMA and batch size."""
    trainable = found.trainable_parameters
    return replace(
        found,
        optimizer_state=trainable * OPTIMIZER_STATE_BYTES.get(training.optimizer, 8),
        ema=trainable * 4 if training.ema_decay else 0,
        activations=found.activations * count_rows(training) // TABLE_ROWS,
    )
