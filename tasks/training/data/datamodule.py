"""The Lightning data module: sample indices become batches on the device."""

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tasks.diffusion.adapter import DiffusionModel
from tasks.training.data.batches import BatchFactory, StepBatch
from tasks.training.process.worker_spec import TrainingSpec


class DreamBoothDataModule(pl.LightningDataModule):
    """Yields the batches of every forward from a given optimizer step on."""

    batches: BatchFactory

    def __init__(self, model: DiffusionModel, spec: TrainingSpec, *, start_step: int = 0) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.start_step = start_step

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Encode the images, which needs the module's placeholder tokens, and return the rank's sample indices.

        Lightning calls `setup` before the module's hooks, but this after all of them.
        """
        trainer = self.trainer
        assert trainer is not None
        self.batches = self.make_batches()
        indices = SampleIndices(
            self.spec, start_step=self.start_step, rank=trainer.global_rank, world_size=trainer.world_size
        )
        return DataLoader(indices, batch_size=None)

    def make_batches(self) -> BatchFactory:
        """Return the factory of batches; the VAE leaves the device when it has encoded all images."""
        batches = BatchFactory(self.model, self.spec)
        self.model.vae.cpu()
        return batches

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> StepBatch:
        """Turn sample indices into batches: random numbers are drawn on the CPU, where they are alike everywhere."""
        indices = batch.tolist()
        return StepBatch(indices, self.batches.make(indices, device))


class SampleIndices(IterableDataset[Tensor]):
    """Yields the global sample indices of one rank's batches, from a given optimizer step on."""

    def __init__(self, spec: TrainingSpec, *, start_step: int, rank: int, world_size: int) -> None:
        super().__init__()
        self.batch_size = spec.training.train_batch_size
        self.stride = world_size * self.batch_size
        self.start = start_step * spec.training.gradient_accumulation_steps * self.stride
        self.offset = rank * self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        first = self.start + self.offset
        while True:
            yield torch.arange(first, first + self.batch_size)
            first += self.stride
