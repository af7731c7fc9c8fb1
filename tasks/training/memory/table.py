"""Predicted memory of the presets as they are, computed beforehand: an answer without importing torch.

`python -m tests.bench.memory_table` computes the table anew; a test compares parts of it.
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
TABLE_ROWS = 2  # images of a forward that the table's activations are of
MOMENT_BYTES = {"adamw8bit": 2, "prodigy": 16}  # of a trained parameter; else two in float32
# What the allocator and the kernels' workspaces take besides, as a share of all else and in bytes.
OVERHEAD_SHARE, OVERHEAD_BYTES = 0.05, 600 * 2**20
CARDS = (8, 16, 24, 80)  # GB, as cards are sold
# The other settings scale what is in the table.
MATTERS = {
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
        """All of it, with the allocator's share."""
        plain = self.weights + self.gradients + self.optimizer_state + self.ema + self.activations
        return int(plain * (1 + OVERHEAD_SHARE)) + OVERHEAD_BYTES

    def find_card(self) -> int | None:
        """Return the smallest usual card that it fits on, in GB; None where it fits on none."""
        return next((card for card in CARDS if self.total <= card * 2**30), None)


def count_rows(training: TrainingConfig) -> int:
    """Return the images of one forward."""
    return training.train_batch_size * (2 if training.prior_loss_weight > 0 else 1)


def describe_key(diffusion: DiffusionConfig, training: TrainingConfig) -> str:
    """Return the digest of all settings that change the prediction in other ways than by scaling it."""
    where = [diffusion.family, diffusion.pretrained_model_name_or_path, diffusion.resolution]
    return digest([TABLE_VERSION, where, training.model_dump(mode="json", include=MATTERS)])[:32]


def look_up(
    diffusion: DiffusionConfig, training: TrainingConfig, methods: Sequence[str]
) -> dict[str, MemoryEstimate] | None:
    """Return the estimates of a preset, for any batch size and optimizer; None for what isn't in the table."""
    rows = json.loads(TABLE.read_text()).get(describe_key(diffusion, training))
    if rows is None or training.fsdp:
        return None
    return {method: scale(MemoryEstimate(**rows[method]), training) for method in methods}


def scale(found: MemoryEstimate, training: TrainingConfig) -> MemoryEstimate:
    """Return a table's estimate for the configured optimizer, averages and images of a forward."""
    trainable = found.trainable_parameters
    return replace(
        found,
        optimizer_state=trainable * MOMENT_BYTES.get(training.optimizer, 8),
        ema=trainable * 4 if training.ema_decay else 0,
        activations=found.activations * count_rows(training) // TABLE_ROWS,
    )
